"""Rows to examples to packed batches."""
