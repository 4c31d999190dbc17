"""GradNorm: a rule that balances the gradients that exits send to the layers below them."""

import math
from collections.abc import Sequence

from megatron_sorted.exits.coefficients import GRADIENTS, LOSSES, Observation
from megatron_sorted.exits.learned import LearnedRule, as_shares, mean


class GradNorm(LearnedRule):
    """GradNorm: c = softmax(s), with s learned so that exits send gradients of balanced size down.

    Exits that learn more slowly than others are to send larger ones. Let

        n_i  norm of exit i's gradient to its hidden state, at coefficient 1
        w_i = K c_i, over the K exits that trained
        G_i = w_i n_i
        r_i = (L_i / L_i(0)) / mean over the exits of the same

    Each step s takes one step of gradient descent on

        sum_i | G_i / mean(G) - r_i^alpha |        (mean(G) and r constant)

    The paper takes norms at the last shared layer's weights, which costs one backward pass per
    exit; at the hidden state they are already known. It takes absolute norms, whose size depends on
    the batch; relative ones make ``rate`` mean the same everywhere. Coefficients are a softmax, as
    in LibMTL, so that none becomes negative.

    Source: GradNorm, Chen et al., arXiv 1711.02257, algorithm 1 (alpha 1.5, rate 0.025); LibMTL
        weighting/GradNorm.py.
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
        """Return losses and gradient norms."""
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
        current = self.coefficients(step)
        weight = as_shares({depth: current[depth] for depth in exits})
        norm = {
            depth: len(exits) * weight[depth] * seen.grad_norms[depth] / seen.coefficients[depth]
            for depth in exits
        }
        ratio = {depth: seen.losses[depth] / self.first_losses[depth] for depth in exits}
        mean_norm, mean_ratio = mean(norm.values()), mean(ratio.values())
        relative = {depth: norm[depth] / mean_norm for depth in exits}
        # w_i times the derivative of the objective to w_i; the softmax then gives that to s_i
        pull = {
            depth: _sign(relative[depth] - (ratio[depth] / mean_ratio) ** self.alpha)
            * relative[depth]
            for depth in exits
        }
        total = sum(pull.values())
        for depth in exits:
            self.scores[depth] -= self.rate * (pull[depth] - weight[depth] * total)


def _sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0
