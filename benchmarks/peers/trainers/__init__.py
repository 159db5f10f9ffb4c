"""Whole trainers, ours and others, as `check_trainer` asks them."""
