"""Completions in turns, by a function of the user's own (`--rollout_func`), with TRL's signature."""
