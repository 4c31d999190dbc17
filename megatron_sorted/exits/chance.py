"""Chance without state: numbers that depend on a text alone, the same on every rank, platform and Python version, also after a resume."""

import hashlib


def uniform_number(text: str) -> float:
    """Returns a number in [0, 1) that depends on ``text`` alone: a hash."""
    digest = hashlib.sha256(text.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53
