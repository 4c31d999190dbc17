"""Which exits train at a step: the same answer on every rank, without talking and without state."""

import hashlib
from collections.abc import Mapping, Sequence


def select_exits(
    step: int,
    seed: int,
    depths: Sequence[int],
    coefficients: Mapping[int, float],
    sampling: str = "all",
    num_sampled: int = 1,
    probabilities: Mapping[int, float] | None = None,
    normalised: bool = True,
) -> dict[int, float]:
    """Returns {depth: coefficient} of the exits that train at this step, in increasing depth.

    An exit whose coefficient is 0 is never among them, so a draw is made among the others; where fewer than ``num_sampled``
    can be drawn, all of them train.

    Args:
        step: the step, from 0; with ``seed`` the only source of chance, so a resumed run draws as the unbroken one.
        seed: the run's seed.
        depths: all exits.
        coefficients: coefficient of every exit at this step.
        sampling: "all", "uniform", or "probabilities".
        num_sampled: how many exits are drawn without replacement, unless "all".
        probabilities: chance of each exit for "probabilities"; one at 0 is never drawn.
        normalised: coefficients are shares of one whole: those of drawn exits are scaled to sum 1.
    """
    active = [depth for depth in sorted(depths) if coefficients[depth] != 0]
    if sampling == "all":
        return {depth: coefficients[depth] for depth in active}
    if sampling == "uniform":
        weights = dict.fromkeys(active, 1.0)
    else:
        assert sampling == "probabilities" and probabilities is not None
        weights = {depth: probabilities[depth] for depth in active if probabilities[depth] > 0}
    drawn = sorted(_draw(weights, num_sampled, f"{seed}/{step}"))
    total = sum(coefficients[depth] for depth in drawn) if normalised else 1.0
    return {depth: coefficients[depth] / total for depth in drawn}


def _draw(weights: dict[int, float], num: int, key: str) -> list[int]:
    """Returns ``num`` keys drawn one after another, each by its share of the weight that is left."""
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


def _uniform(key: str) -> float:
    """Returns a number in [0, 1) that depends on the text alone: a hash, so that no Python version or platform changes a run."""
    digest = hashlib.sha256(f"exit selection {key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53
