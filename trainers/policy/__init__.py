"""Weights to log-probabilities: the policy, its adapters, and what it is compared with."""
