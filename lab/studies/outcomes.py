"""Gaps: how far each depth of a nested model is from a model of that depth trained separately."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

Losses = Mapping[int, float]
"""{depth: nats per token} of one trained model on the held-out samples."""

# Two-sided 95 % points of Student's t distribution by degrees of freedom. Beyond the table that of
# the normal distribution is used.
STUDENT = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    10: 2.228,
}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        half_width: Half the width of its 95 % confidence interval (Student's t over seeds); None
            for a single seed.
    """

    value: float
    half_width: float | None

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval lies below zero; False without an interval."""
        return self.half_width is not None and self.value + self.half_width < 0

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.half_width is not None and self.value - self.half_width > 0

    def __str__(self) -> str:
        return f"{round(self.value, 3) + 0.0:+.3f}" + (
            f" ± {self.half_width:.3f}" if self.half_width is not None else ""
        )


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and confidence interval of one value for each seed.

    >>> str(estimate([1.0, 2.0, 3.0]))
    '+2.000 ± 2.484'
    """
    if len(values) < 2:
        return Estimate(fmean(values), None)
    return Estimate(
        fmean(values), STUDENT.get(len(values) - 1, 1.96) * stdev(values) / math.sqrt(len(values))
    )


@dataclass(frozen=True)
class Outcomes:
    """The losses of all trainings on one data set.

    Attributes:
        separate: {depth: loss} of the separately trained models, one for each seed.
        taught: The same with the model of full depth and the same seed as teacher; may be empty.
        nested: {variant: losses of its nested models, one for each seed}.
        uniform: Name of the variant that others are compared with.
    """

    separate: Sequence[Losses]
    taught: Sequence[Losses]
    nested: Mapping[str, Sequence[Losses]]
    uniform: str = "uniform"

    @property
    def depths(self) -> list[int]:
        """The depths that are compared, increasing."""
        return sorted(self.separate[0])

    def loss(self, variant: str, depth: int) -> Estimate:
        """Return the loss of a variant at a depth."""
        return estimate([losses[depth] for losses in self.nested[variant]])

    def separate_loss(self, depth: int) -> Estimate:
        """Return the loss of the separately trained models of a depth."""
        return estimate([losses[depth] for losses in self.separate])

    def taught_loss(self, depth: int) -> Estimate:
        """Return the loss of the separately trained models of a depth that had a teacher."""
        return estimate([losses[depth] for losses in self.taught])

    def gap(self, variant: str, depth: int) -> Estimate:
        """Return the nested minus the separate loss at a depth, paired by seed."""
        return estimate(
            [
                losses[depth] - alone[depth]
                for losses, alone in zip(self.nested[variant], self.separate, strict=False)
            ]
        )

    def mean_gap(self, variant: str) -> Estimate:
        """Return the mean gap over depths."""
        return estimate(
            [
                fmean(losses[depth] - alone[depth] for depth in self.depths)
                for losses, alone in zip(self.nested[variant], self.separate, strict=False)
            ]
        )

    def full_gap(self, variant: str) -> Estimate:
        """Return the gap of the full model."""
        return self.gap(variant, self.depths[-1])

    def point(self, variant: str) -> tuple[float, float]:
        """Return the variant's point in the picture: (gap of the full model, mean gap)."""
        return self.full_gap(variant).value, self.mean_gap(variant).value

    def change(self, variant: str, depths: Sequence[int] | None = None) -> Estimate:
        """Return the mean loss over ``depths`` (default: all) minus uniform's, paired by seed."""
        chosen = depths or self.depths
        pairs = zip(self.nested[variant], self.nested[self.uniform], strict=False)
        return estimate(
            [fmean(losses[depth] - plain[depth] for depth in chosen) for losses, plain in pairs]
        )

    def closed(self, variant: str, full: bool = False) -> float | None:
        """Return the share of uniform's mean (or ``full``-depth) gap that the variant closes.

        None if uniform has no gap: it is not above zero, or within the noise of seeds.
        """
        gap = self.full_gap if full else self.mean_gap
        before = gap(self.uniform)
        is_gap = before.value > 0 if before.half_width is None else before.above_zero
        return 1 - gap(variant).value / before.value if is_gap else None


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other is both left of and below, from left to right.

    >>> front([(0.0, 2.0), (1.0, 1.0), (1.0, 3.0)])
    [(0.0, 2.0), (1.0, 1.0)]
    """
    kept: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def beyond(point: tuple[float, float], line: Sequence[tuple[float, float]]) -> float | None:
    """Return how far a point lies below a front at its own x.

    Above 0 it is better than all static weights, interpolated linearly. None left of the front,
    where there is nothing to compare with. Right of it the front continues level: a worse x is
    worth nothing.
    """
    x, y = point
    if x < line[0][0]:
        return None
    for (left, high), (right, low) in itertools.pairwise(line):
        if left <= x <= right:
            return high + (low - high) * (x - left) / (right - left) - y
    return line[-1][1] - y


def meets_goal(outcomes: Outcomes, variant: str, share: float = 1 / 3) -> list[str]:
    """Return which of the goals "mean" and "full" a variant meets, outside the noise of seeds.

    *mean*: at least ``share`` of uniform's mean gap closed, the full depth not worse. *full*: at
    least ``share`` of the full depth's gap closed, the mean not worse. Not worse: the change is
    below zero or its interval holds zero; better: its whole interval lies below zero.
    """
    last = [outcomes.depths[-1]]
    mean, full = outcomes.change(variant), outcomes.change(variant, last)
    met = []
    closed_mean, closed_full = outcomes.closed(variant), outcomes.closed(variant, full=True)
    if closed_mean is not None and closed_mean >= share and mean.below_zero and not full.above_zero:
        met.append("mean")
    if closed_full is not None and closed_full >= share and full.below_zero and not mean.above_zero:
        met.append("full")
    return met
