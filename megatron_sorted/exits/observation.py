"""What a rule that learns is told of a finished step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

LOSSES = "losses"
GRADIENTS = "gradients"
EXIT_LAYERS = "exit layers"
"""What a rule may need to be told; measured and reduced over ranks only if it does."""


@dataclass(frozen=True)
class Observation:
    """A step that the optimizer took, over the whole global batch: the same on every rank.

    Attributes:
        losses: Mean loss, in nats a token, of every exit that trained.
        coefficients: {depth: coefficient} that these exits trained with.
        grad_norms: Norm of the gradient that each of these exits sent into the hidden state below it, coefficient included.
        exit_shares: Share of the tokens, averaged over the rule's thresholds, whose shallowest exit that is sure enough is this one;
            tokens for which none is count for the last exit. They sum to 1.
        confidences: Smallest and largest probability of a most likely token, over tokens and exits.
    """

    losses: Mapping[int, float]
    coefficients: Mapping[int, float]
    grad_norms: Mapping[int, float] = field(default_factory=dict)
    exit_shares: Mapping[int, float] = field(default_factory=dict)
    confidences: tuple[float, float] = (0.0, 1.0)
