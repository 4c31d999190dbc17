"""Comparison of decoding strategies on the same prompts."""
