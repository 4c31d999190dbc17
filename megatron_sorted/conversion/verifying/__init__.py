"""Comparison of two directories: every tensor bit for bit, the logits of every exit."""
