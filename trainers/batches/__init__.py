"""Examples to packed micro-batches: rows of token ids, what of them is seen, what a loss is called with."""
