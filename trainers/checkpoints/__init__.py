"""What a run keeps: its folder, the trained model, and checkpoints from which it goes on as if it had never stopped."""
