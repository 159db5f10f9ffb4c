"""What every room stands on: objects by name, signals, random states, and by which code a run computes."""
