"""What a transformer layer computes, with fewer kernels and with less kept for the backward pass."""
