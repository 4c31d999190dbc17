"""How sure an exit is of its next token: what decides whether the token leaves there."""

import math
from collections.abc import Callable

from torch import Tensor


def highest_probability(logits: Tensor) -> Tensor:
    """Returns the probability of the most likely token (Schuster et al., CALM, arXiv 2207.07061; Sorted LLaMA; S2D)."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def margin(logits: Tensor) -> Tensor:
    """Returns the probability of the most likely token less that of the next (CALM, arXiv 2207.07061, section 3.1)."""
    two = (logits.topk(2, dim=-1).values - logits.logsumexp(-1, keepdim=True)).exp()
    return two[..., 0] - two[..., 1]


def certainty(logits: Tensor) -> Tensor:
    """Returns 1 - entropy / log(vocabulary): 1 for one sure token, 0 where all are alike (BranchyNet, arXiv 1709.01686, by entropy)."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1)
    return 1 - entropy / math.log(logits.size(-1))


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"probability": highest_probability, "margin": margin, "entropy": certainty}
"""By name; each [..., v] -> [...], in 0..1, higher is surer. A token leaves where it is above the exit's threshold."""
