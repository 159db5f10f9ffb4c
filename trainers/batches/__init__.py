"""Examples to packed micro-batches: rows of token ids, the blocks of them that are seen, what a loss is called with."""
