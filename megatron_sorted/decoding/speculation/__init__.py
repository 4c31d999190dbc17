"""Speculative decoding: early exits draft tokens, the full model verifies them."""
