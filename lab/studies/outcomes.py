"""Losses of all trainings as gaps: how far each depth of a nested model is from a model of that depth trained by itself."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_json_object

Losses = Mapping[int, float]
"""{depth: nats per token} of one trained model on the held-out samples."""

# Two-sided 95 % points of Student's t distribution by degrees of freedom; beyond the table the normal distribution's.
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
        half_width: Half the width of its 95 % confidence interval (Student's t over seeds); None for a single seed.
    """

    value: float
    half_width: float | None

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval lies below zero; without an interval nothing is said to."""
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
    """Return mean and confidence interval of one value a seed."""
    if len(values) < 2:
        return Estimate(fmean(values), None)
    return Estimate(
        fmean(values), STUDENT.get(len(values) - 1, 1.96) * stdev(values) / math.sqrt(len(values))
    )


def read_losses(path: Path, name: str) -> dict[int, float]:
    """Return the loss at every exit of the set ``name`` in an evaluation.json of the trainer.

    Raises:
        DataError: It is no such file, or lacks the set.
    """
    try:
        found = read_json_object(path, "Start again with --fresh.")["sets"][name]
        return {int(depth): float(numbers["loss"]) for depth, numbers in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: no evaluation of {name!r} by the trainer ({error}). Start again with --fresh."
        ) from error


@dataclass(frozen=True)
class Outcomes:
    """What all trainings of one data set gave.

    Attributes:
        separate: One a seed: {depth: loss} of the models that were trained separately, each at its own depth.
        taught: The same, with that of full depth and the same seed as teacher; may be empty.
        nested: Nested models by variant, one a seed.
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
        """Return the loss of the separately trained models of a depth that were taught."""
        return estimate([losses[depth] for losses in self.taught])

    def gap(self, variant: str, depth: int) -> Estimate:
        """Return nested minus separate at a depth, paired by seed."""
        return estimate(
            [
                losses[depth] - alone[depth]
                for losses, alone in zip(self.nested[variant], self.separate, strict=False)
            ]
        )

    def mean_gap(self, variant: str) -> Estimate:
        """Return the gap's mean over depths."""
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
        """Return where the variant stands in the picture: (gap of the full model, mean gap)."""
        return self.full_gap(variant).value, self.mean_gap(variant).value

    def change(self, variant: str, depths: Sequence[int] | None = None) -> Estimate:
        """Return the mean loss over ``depths`` (all by default) minus that of uniform, paired by seed."""
        chosen = depths or self.depths
        pairs = zip(self.nested[variant], self.nested[self.uniform], strict=False)
        return estimate(
            [fmean(losses[depth] - plain[depth] for depth in chosen) for losses, plain in pairs]
        )

    def closed(self, variant: str, full: bool = False) -> float | None:
        """Return which share of uniform's mean (or ``full``-depth) gap the variant closes.

        None where uniform has no gap: it is not above zero, or not outside the noise of seeds.
        """
        find = self.full_gap if full else self.mean_gap
        before = find(self.uniform)
        is_gap = before.value > 0 if before.half_width is None else before.above_zero
        return 1 - find(variant).value / before.value if is_gap else None


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return those points that no other is below and left of, from left to right: what can be had by sliding along."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def beyond(point: tuple[float, float], line: Sequence[tuple[float, float]]) -> float | None:
    """Return how far a point lies below a front at its own x: above 0 is better than all static weights, linearly between neighbours.

    None left of the front, where there is nothing to compare with. Right of it the front goes on level: a worse x is worth nothing.
    """
    x, y = point
    if x < line[0][0]:
        return None
    for (left, high), (right, low) in itertools.pairwise(line):
        if left <= x <= right:
            return high + (low - high) * (x - left) / (right - left) - y
    return line[-1][1] - y


def meets_goal(outcomes: Outcomes, variant: str, share: float = 1 / 3) -> list[str]:
    """Return which of the two goals a variant meets, outside the noise of seeds: "mean" and "full".

    *mean*: at least ``share`` of uniform's mean gap closed, the full depth not worse. *full*: the same of the full depth's gap, the
    mean not worse. Not worse: the change is below zero or its interval holds zero; better: its whole interval lies below zero.
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
