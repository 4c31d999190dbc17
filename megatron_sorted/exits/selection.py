"""Which exits train at a step: equal on every rank, without communication and without state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sorted.exits.chance import uniform_number


@dataclass(frozen=True)
class ExitSampling:
    """How exits are drawn at each step.

    Attributes:
        seed: The run's seed; draws depend on it and the step alone, so a resumed run draws as an
            unbroken one does.
        kind: "all", "uniform", "probabilities", or "coefficients" (see ``_draw_in_proportion``).
        num: Number of exits drawn, unless "all"; without replacement, unless "coefficients".
        probabilities: Probability of each exit for "probabilities"; one at 0 is never drawn.
    """

    seed: int = 0
    kind: str = "all"
    num: int = 1
    probabilities: Mapping[int, float] | None = None


def select_exits(
    step: int, coefficients: Mapping[int, float], sampling: ExitSampling, normalised: bool = True
) -> dict[int, float]:
    """Return {depth: coefficient} of the exits that train at this step, in increasing depth.

    An exit whose coefficient is 0 is never among them, so a draw is made among the others; where
    fewer than ``sampling.num`` can be drawn, all of them train.

    Args:
        step: The step, from 0.
        coefficients: Coefficient of every exit at this step.
        sampling: How exits are drawn.
        normalised: Whether coefficients sum to 1; then those of drawn exits are scaled to sum 1.
    """
    key, num, probabilities = f"{sampling.seed}/{step}", sampling.num, sampling.probabilities
    active = [depth for depth in sorted(coefficients) if coefficients[depth] != 0]
    if sampling.kind == "all":
        return {depth: coefficients[depth] for depth in active}
    if sampling.kind == "coefficients":
        counts = _draw_in_proportion({depth: coefficients[depth] for depth in active}, num, key)
        total = 1.0 if normalised else sum(coefficients[depth] for depth in active)
        return {depth: total * count / num for depth, count in counts.items()}
    if sampling.kind == "uniform":
        weights = dict.fromkeys(active, 1.0)
    else:
        assert sampling.kind == "probabilities" and probabilities is not None
        weights = {depth: probabilities[depth] for depth in active if probabilities[depth] > 0}
    drawn = sorted(_draw(weights, num, key))
    total = sum(coefficients[depth] for depth in drawn) if normalised else 1.0
    return {depth: coefficients[depth] / total for depth in drawn}


def _draw(weights: dict[int, float], num: int, key: str) -> list[int]:
    """Draw ``num`` depths one after another, each by its share of the remaining weight."""
    left, drawn = dict(weights), []
    while left and len(drawn) < num:
        point = _uniform(f"{key}/{len(drawn)}") * sum(left.values())
        chosen = next(iter(left))
        for depth, weight in left.items():
            chosen = depth
            point -= weight
            if point < 0:
                break
        drawn.append(chosen)
        del left[chosen]
    return drawn


def _draw_in_proportion(weights: dict[int, float], num: int, key: str) -> dict[int, int]:
    """Return {depth: how often it is drawn} of ``num`` draws in proportion to ``weights``.

    The expected count of a depth is exactly ``num`` times its share of the weights. So exits
    weighted by how often they are drawn have the expected gradient of all exits with their
    coefficients; drawing more than one without replacement has not. A depth is drawn more than once
    only if its share exceeds 1 / ``num``.

    Source: systematic sampling (Madow, Annals of Mathematical Statistics 20, 1949): equally spaced
        points with one random shift.
    """
    spacing = sum(weights.values()) / num
    shift, before, counts = _uniform(f"{key}/0"), 0, {}
    reached, last = 0.0, max(weights)
    for depth, weight in weights.items():
        reached += weight / spacing
        # number of the points shift, shift + 1, ... below the weight reached so far; rounding may
        # leave the last sum a little below ``num``
        points = num if depth == last else min(num, max(0, math.ceil(reached - shift)))
        if points > before:
            counts[depth] = points - before
        before = points
    return counts


def _uniform(key: str) -> float:
    return uniform_number(f"exit selection {key}")
