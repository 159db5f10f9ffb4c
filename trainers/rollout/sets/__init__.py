"""Rollouts that are sampled at once: asked for, in flight, filled up, dealt to the steps that learn from them, kept."""
