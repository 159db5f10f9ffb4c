"""Cases, measuring and checking; may import everything."""
