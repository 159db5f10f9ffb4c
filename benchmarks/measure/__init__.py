"""What is timed, and beside whom."""
