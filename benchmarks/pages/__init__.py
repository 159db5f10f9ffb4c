"""A training run as a page: what its folder holds, drawn and told in one file that needs nothing else."""
