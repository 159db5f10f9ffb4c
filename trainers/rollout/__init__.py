"""Prompts to scored groups of completions."""
