"""Random numbers without state: each depends on a text alone.

So they are the same on every rank, platform and Python version, and after a resume.
"""

import hashlib
from collections.abc import Sequence


def hashed_number(text: str) -> int:
    """Return a number in [0, 2^64) that depends on ``text`` alone: a hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def uniform_number(text: str) -> float:
    """Return a number in [0, 1) that depends on ``text`` alone.

    >>> uniform_number("step 7") == uniform_number("step 7")
    True
    """
    return (hashed_number(text) >> 11) / 2.0**53


def draw_rank(step: int, seed: int, ranks: Sequence[int]) -> int:
    """Draw one of an adapter's nested ``ranks``, each with the same probability.

    The draw depends on seed and step alone, so it is the same in every process.

    Source: DyLoRA (Valipour et al., arXiv 2210.07558, section 4), which draws the rank of a step
        from a distribution over 1..r, uniform in its experiments; QDyLoRA (arXiv 2402.10462) draws
        from a list.

    Args:
        step: Number of the step, from 0.
        seed: The run's seed.
        ranks: The ranks to draw from.
    """
    return ranks[hashed_number(f"adapter rank {seed}/{step}") * len(ranks) >> 64]
