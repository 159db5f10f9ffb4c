"""How rewards are called: what they are given, where they run, what they may answer with, and what is said where one
fails."""
