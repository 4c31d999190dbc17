"""Rules that learn from the exits' losses alone.

L_i is the loss of exit i at a step (nats a token), c_i its coefficient.
"""

import math
from collections.abc import Mapping, Sequence

from megatron_sorted.exits.coefficients import Observation
from megatron_sorted.exits.learned import LearnedRule, as_shares, mean


class Uncertainty(LearnedRule):
    """Weighting by uncertainty: c_i is the share of 1 / (2 e^{s_i}), s_i a learned log variance.

    The s_i minimise sum_i L_i / (2 e^{s_i}) + s_i / 2. They take plain gradient steps, outside the
    model's optimizer:

        s_i <- s_i - rate * (1 - L_i / e^{s_i}) / 2

    At rest e^{s_i} = L_i.

    Source: Kendall, Gal and Cipolla, arXiv 1705.07115, in the form of LibMTL (weighting/UW.py),
        where s starts at -0.5.
    """

    name = "uncertainty"
    tables = ("uncertainty",)

    def __init__(self, depths: Sequence[int], rate: float, initial_variance: float):
        super().__init__(depths)
        self.rate = rate
        self.uncertainty = dict.fromkeys(self.depths, math.log(initial_variance))

    def coefficients(self, step: int) -> dict[int, float]:
        """Return the shares of 1 / (2 e^s)."""
        smallest = min(self.uncertainty.values())
        return as_shares({depth: math.exp(smallest - s) for depth, s in self.uncertainty.items()})

    def observe(self, step: int, seen: Observation) -> None:
        """Take one gradient step for every exit that trained."""
        for depth, loss in seen.losses.items():
            self.uncertainty[depth] -= (
                self.rate * (1 - loss * math.exp(-self.uncertainty[depth])) / 2
            )


class InverseLoss(LearnedRule):
    """Weighting by the inverse loss: c_i is the share of 1 / (moving mean of L_i).

    This follows the gradient of sum_i log L_i. An exit that has not trained yet counts as the mean
    of the others.

    Source: AdaLoss, Hu et al., arXiv 1708.06832.
    """

    name = "inverse_loss"
    tables = ("average",)

    def __init__(self, depths: Sequence[int], decay: float):
        super().__init__(depths)
        self.decay = decay
        self.average: dict[int, float] = {}

    def coefficients(self, step: int) -> dict[int, float]:
        """Return the shares of 1 / (moving mean of the loss); equal ones before the first step."""
        usual = mean(self.average.values()) if self.average else 1.0
        return as_shares(
            {depth: 1 / max(self.average.get(depth, usual), 1e-12) for depth in self.depths}
        )

    def observe(self, step: int, seen: Observation) -> None:
        """Update the moving means; each starts at its exit's first loss."""
        for depth, loss in seen.losses.items():
            self.average[depth] = (
                self.decay * self.average.get(depth, loss) + (1 - self.decay) * loss
            )


class LossRatio(LearnedRule):
    """Dynamic weight average (DWA): c = softmax(r / T).

    r_i is exit i's mean loss in the last window of steps over that in the window before. The
    paper's windows are epochs. Until two windows are over, and for an exit that trained in only one
    of them, r_i is 1.

    Source: Liu, Johns and Davison, arXiv 1803.10704, equation 7.
    """

    name = "dwa"
    tables = ("sums", "counts", "last", "before")

    def __init__(self, depths: Sequence[int], window: int, temperature: float):
        super().__init__(depths)
        self.window, self.temperature = window, temperature
        self.sums: dict[int, float] = {}
        self.counts: dict[int, int] = {}
        self.last: dict[int, float] = {}
        self.before: dict[int, float] = {}

    def coefficients(self, step: int) -> dict[int, float]:
        """Return softmax(r / T)."""
        ratio = {
            depth: self.last[depth] / max(self.before[depth], 1e-12)
            if depth in self.last and depth in self.before
            else 1.0
            for depth in self.depths
        }
        highest = max(ratio.values())
        return as_shares(
            {depth: math.exp((r - highest) / self.temperature) for depth, r in ratio.items()}
        )

    def observe(self, step: int, seen: Observation) -> None:
        """Add the losses to the window, which ends with every ``window``-th step of the run.

        Where that step was skipped, the window extends to the end of the next one.
        """
        for depth, loss in seen.losses.items():
            self.sums[depth] = self.sums.get(depth, 0.0) + loss
            self.counts[depth] = self.counts.get(depth, 0) + 1
        if (step + 1) % self.window == 0:
            self.before, self.last = (
                self.last,
                {depth: total / self.counts[depth] for depth, total in self.sums.items()},
            )
            self.sums, self.counts = {}, {}


class ExcessLoss(LearnedRule):
    """Group DRO on excess losses: exits further above their reference losses count more.

        c_i <- c_i exp(rate * max(L_i - reference_i, 0)),  divided by their sum
        c_i <- (1 - smoothing) c_i + smoothing / K         for K exits

    Source: group DRO, Sagawa et al., arXiv 1911.08731, algorithm 1 (rate 0.01); excess over a
        reference, clipped at 0, and smoothing 1e-3: DoReMi, Xie et al., arXiv 2305.10429,
        algorithm 1.
    """

    name = "excess_loss"
    tables = ("shares",)

    def __init__(
        self, depths: Sequence[int], references: Mapping[int, float], rate: float, smoothing: float
    ):
        super().__init__(depths)
        self.references, self.rate, self.smoothing = dict(references), rate, smoothing
        self.shares = dict.fromkeys(self.depths, 1 / len(self.depths))

    def coefficients(self, step: int) -> dict[int, float]:
        """Return the shares."""
        return as_shares(self.shares)

    def observe(self, step: int, seen: Observation) -> None:
        """Take one multiplicative step for every exit that trained."""
        excess = {
            depth: max(loss - self.references[depth], 0.0) for depth, loss in seen.losses.items()
        }
        # subtracted in the exponent against overflow; dividing by the sum cancels it
        largest = max(excess.values(), default=0.0)
        moved = as_shares(
            {
                depth: share * math.exp(self.rate * (excess.get(depth, 0.0) - largest))
                for depth, share in self.shares.items()
            }
        )
        equal = self.smoothing / len(self.depths)
        self.shares = {
            depth: (1 - self.smoothing) * share + equal for depth, share in moved.items()
        }
