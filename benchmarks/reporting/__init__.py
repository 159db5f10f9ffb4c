"""Measured lines, and the tables and plots made of them."""
