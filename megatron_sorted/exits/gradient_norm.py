"""A rule that makes every exit push the layers below it about equally hard: GradNorm, measured at the exits' taps."""

import math
from collections.abc import Sequence

from megatron_sorted.exits.coefficients import GRADIENTS, LOSSES, Observation
from megatron_sorted.exits.learned import LearnedRule, as_shares, mean


class GradNorm(LearnedRule):
    """Coefficients softmax(s); s is moved so that exits that learn slowly send larger gradients down, all others equal ones.

    With n_i the norm of exit i's gradient at its tap for coefficient 1, w_i = K c_i over the K exits that trained, G_i = w_i n_i and
    r_i = (L_i / L_i(0)) / mean of these, one step of gradient descent on

        sum_i | G_i / mean(G) - r_i^alpha |        (mean(G) and r constant)

    The paper takes norms at the last shared layer's weights, which costs a backward pass an exit; at the tap they are known
    already. It takes absolute norms, whose size depends on the batch; relative ones make ``rate`` mean the same everywhere. Coefficients
    are a softmax, as in LibMTL, so that none gets negative.

    Source: GradNorm, Chen et al., arXiv 1711.02257, algorithm 1 (alpha 1.5, rate 0.025); LibMTL weighting/GradNorm.py.
    """

    name = "gradnorm"
    tables = ("scores", "first_losses")

    def __init__(self, depths: Sequence[int], rate: float, alpha: float):
        super().__init__(depths)
        self.rate, self.alpha = rate, alpha
        self.scores = dict.fromkeys(self.depths, 0.0)
        self.first_losses: dict[int, float] = {}

    @property
    def needs(self) -> frozenset[str]:
        """Return what the rule is told: losses and norms."""
        return frozenset({LOSSES, GRADIENTS})

    def coefficients(self, step: int) -> dict[int, float]:
        """Return softmax(s)."""
        highest = max(self.scores.values())
        return as_shares({depth: math.exp(score - highest) for depth, score in self.scores.items()})

    def observe(self, step: int, seen: Observation) -> None:
        """Take one gradient step over the exits that trained."""
        for depth, loss in seen.losses.items():
            self.first_losses.setdefault(depth, max(loss, 1e-12))
        exits = [depth for depth in seen.losses if seen.grad_norms.get(depth, 0.0) > 0]
        if len(exits) < 2:
            return
        mine = self.coefficients(step)
        weight = as_shares({depth: mine[depth] for depth in exits})
        norm = {
            depth: len(exits) * weight[depth] * seen.grad_norms[depth] / seen.coefficients[depth]
            for depth in exits
        }
        ratio = {depth: seen.losses[depth] / self.first_losses[depth] for depth in exits}
        usual_norm, usual_ratio = mean(norm.values()), mean(ratio.values())
        relative = {depth: norm[depth] / usual_norm for depth in exits}
        pull = {
            depth: _sign(relative[depth] - (ratio[depth] / usual_ratio) ** self.alpha)
            * relative[depth]
            for depth in exits
        }
        total = sum(pull.values())
        for depth in exits:
            self.scores[depth] -= self.rate * (pull[depth] - weight[depth] * total)


def _sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0
