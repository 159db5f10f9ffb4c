"""Tokenized rows in Arrow files, and the sequences of examples that read them."""
