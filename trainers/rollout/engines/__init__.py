"""What samples completions: in this process, or a server beside it."""
