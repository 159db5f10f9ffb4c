"""What a run says while it runs: a chained file of figures, a progress line, streams that it outlives."""
