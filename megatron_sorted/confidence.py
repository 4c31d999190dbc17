"""Measures of an exit's confidence in its next token, and how many tokens it may draft."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names of measures are needed where there is no torch
    from torch import Tensor

MAX_DRAFT_TOKENS = 64
"""Largest number of tokens that may be drafted before a verification."""


def highest_probability(logits: "Tensor") -> "Tensor":
    """Return the probability of the most likely token.

    Source: CALM (Schuster et al., arXiv 2207.07061), Sorted LLaMA, S2D.
    """
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def margin(logits: "Tensor") -> "Tensor":
    """Return the difference of the two highest probabilities.

    Source: CALM (arXiv 2207.07061, section 3.1).
    """
    two = (logits.topk(2, dim=-1).values - logits.logsumexp(-1, keepdim=True)).exp()
    return two[..., 0] - two[..., 1]


def certainty(logits: "Tensor") -> "Tensor":
    """Return 1 - entropy / log(vocabulary): 1 for one certain token, 0 if all are equally likely.

    Source: BranchyNet (arXiv 1709.01686), which uses the entropy itself.
    """
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1)
    return 1 - entropy / math.log(logits.size(-1))


CONFIDENCE: dict[str, Callable[["Tensor"], "Tensor"]] = {
    "probability": highest_probability,
    "margin": margin,
    "entropy": certainty,
}
"""An exit's confidence in its next token, by name of the measure: logits [..., v] -> [...] in 0..1.

A token exits where its confidence is above the exit's threshold.
"""
MEASURES = tuple(CONFIDENCE)
"""The names of the measures."""
