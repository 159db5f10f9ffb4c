"""One optimizer step: cases, ours and the others that take it, its truth, and what it costs the device and the host."""
