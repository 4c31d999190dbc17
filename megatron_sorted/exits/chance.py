"""Chance without state: numbers that depend on a text alone, the same on every rank, platform and Python version, also after a resume."""

import hashlib


def hashed_number(text: str) -> int:
    """Returns a number in [0, 2^64) that depends on ``text`` alone: a hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def uniform_number(text: str) -> float:
    """Returns a number in [0, 1) that depends on ``text`` alone."""
    return (hashed_number(text) >> 11) / 2.0**53
