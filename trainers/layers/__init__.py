"""What a model's layers compute, those of adapters among them: fewer kernels, and less kept for the backward pass."""
