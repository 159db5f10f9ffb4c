"""The embedded tasks, which need no network."""
