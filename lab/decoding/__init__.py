"""Proofs and measurements of decoding."""
