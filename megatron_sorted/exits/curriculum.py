"""Which exits count at all at a step, on top of any rule: LayerSkip's curricula."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sorted.exits.coefficients import RuleOnTop


def rotation(depths: Sequence[int], interval: int) -> Callable[[int], set[int]]:
    """Return the rotational curriculum: a function of the step that gives the exits that are on.

    Every ``interval``-th intermediate exit is on, beginning one exit higher at each step; the last
    exit always is on.

    >>> on = rotation([2, 4, 6, 8], interval=2)
    >>> sorted(on(0)), sorted(on(1))
    ([2, 6, 8], [4, 8])

    Source: LayerSkip, arXiv 2404.16710, section 4.1.2 (C_rot,R); that the last exit is always on:
        pytorch/torchtune, early_exit_loss.py.
    """
    *others, last = sorted(depths)
    return lambda step: (
        {depth for place, depth in enumerate(others) if place % interval == step % interval}
        | {last}
    )


def gradual(depths: Sequence[int], num_steps: float) -> Callable[[int], set[int]]:
    """Return the gradual curriculum: a function of the step that gives the exits that are on.

    At first only the last exit is on; after each ``num_steps`` / (number of exits) steps the next
    one below joins.

    Source: LayerSkip, arXiv 2404.16710, section 4.1.2 (C_grad), whose ``num_steps`` is half of the
        training.
    """
    downwards = sorted(depths, reverse=True)
    return lambda step: {
        depth for place, depth in enumerate(downwards) if step >= place * num_steps / len(downwards)
    }


@dataclass
class Curriculum(RuleOnTop):
    """Coefficients of the rule below, with 0 for exits that are off.

    Where coefficients are shares, the others are divided to sum 1 again. A curriculum has no state.

    Attributes:
        switched_on: Function of the step that returns the exits that are on.
    """

    switched_on: Callable[[int], set[int]]

    def coefficients(self, step: int) -> dict[int, float]:
        """Return the coefficients of the exits that are on, and 0 for the others."""
        below, on = self.rule.coefficients(step), self.switched_on(step)
        total = sum(below[depth] for depth in on) if self.normalised else 1.0
        return {
            depth: coefficient / total if depth in on else 0.0
            for depth, coefficient in below.items()
        }
