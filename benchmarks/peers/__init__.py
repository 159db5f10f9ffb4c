"""Our losses beside the oracle's, TRL's and Liger's."""
