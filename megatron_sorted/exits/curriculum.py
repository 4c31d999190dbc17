"""Which exits count at all at a step, on top of any rule: LayerSkip's curricula."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sorted.exits.coefficients import RuleOnTop


def rotation(depths: Sequence[int], interval: int) -> Callable[[int], set[int]]:
    """Return {exits that are on} as a function of the step: every ``interval``-th intermediate one, moved on by one a step; and the last.

    Source: LayerSkip, arXiv 2404.16710, section 4.1.2 (C_rot,R); that the last is always on: pytorch/torchtune, early_exit_loss.py.
    """
    *others, last = sorted(depths)
    return lambda step: (
        {depth for place, depth in enumerate(others) if place % interval == step % interval}
        | {last}
    )


def gradual(depths: Sequence[int], num_steps: float) -> Callable[[int], set[int]]:
    """Return {exits that are on} as a function of the step: the last at first, one more below it each ``num_steps`` / exits steps.

    Source: LayerSkip, arXiv 2404.16710, section 4.1.2 (C_grad), whose ``num_steps`` is half of the training.
    """
    downwards = sorted(depths, reverse=True)
    return lambda step: {
        depth for place, depth in enumerate(downwards) if step >= place * num_steps / len(downwards)
    }


@dataclass
class Curriculum(RuleOnTop):
    """Coefficients of the rule below, 0 for exits that are off; where they are shares, divided to sum 1 again. It has no state.

    Attributes:
        switched_on: {exits that are on} as a function of the step.
    """

    switched_on: Callable[[int], set[int]]

    def coefficients(self, step: int) -> dict[int, float]:
        """Return the coefficients of the exits that are on, and 0 for the others."""
        below, here = self.rule.coefficients(step), self.switched_on(step)
        whole = sum(below[depth] for depth in here) if self.normalised else 1.0
        return {
            depth: coefficient / whole if depth in here else 0.0
            for depth, coefficient in below.items()
        }
