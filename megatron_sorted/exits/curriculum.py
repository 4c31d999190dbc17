"""Which exits count at all at a step, on top of any rule: LayerSkip's curricula."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sorted.exits.coefficients import CoefficientRule
from megatron_sorted.exits.observation import Observation


def rotation(depths: Sequence[int], interval: int) -> Callable[[int], set[int]]:
    """Returns {exits that are on} as a function of the step: every ``interval``-th intermediate one, moved on by one a step; and the last.

    Source: LayerSkip, arXiv 2404.16710, section 4.1.2 (C_rot,R); that the last is always on: pytorch/torchtune, early_exit_loss.py.
    """
    *others, last = sorted(depths)
    return lambda step: {depth for place, depth in enumerate(others) if place % interval == step % interval} | {last}


def gradual(depths: Sequence[int], num_steps: float) -> Callable[[int], set[int]]:
    """Returns {exits that are on} as a function of the step: the last at first, one more below it each ``num_steps`` / exits steps.

    Source: LayerSkip, arXiv 2404.16710, section 4.1.2 (C_grad), whose ``num_steps`` is half of the training.
    """
    downwards = sorted(depths, reverse=True)
    return lambda step: {depth for place, depth in enumerate(downwards) if step >= place * num_steps / len(downwards)}


@dataclass
class Curriculum(CoefficientRule):
    """Coefficients of the rule below, 0 for exits that are off; where they are shares, divided to sum 1 again.

    Attributes:
        rule: The rule below.
        switched_on: {exits that are on} as a function of the step.
    """

    rule: CoefficientRule
    switched_on: Callable[[int], set[int]]

    @property
    def normalised(self) -> bool:
        """Returns whether the rule below gives shares."""
        return self.rule.normalised

    @property
    def needs(self) -> frozenset[str]:
        """Returns what the rule below needs."""
        return self.rule.needs

    def thresholds(self, step: int) -> tuple[float, ...]:
        """Returns those of the rule below."""
        return self.rule.thresholds(step)

    def coefficients(self, step: int) -> dict[int, float]:
        """Returns the coefficients of the exits that are on, and 0 for the others."""
        below, here = self.rule.coefficients(step), self.switched_on(step)
        whole = sum(below[depth] for depth in here) if self.normalised else 1.0
        return {depth: coefficient / whole if depth in here else 0.0 for depth, coefficient in below.items()}

    def observe(self, step: int, seen: Observation) -> None:
        """Returns nothing; tells the rule below."""
        self.rule.observe(step, seen)

    def numbers(self) -> dict[str, float]:
        """Returns what the rule below shows."""
        return self.rule.numbers()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the rule below; a curriculum knows the step and has none."""
        return self.rule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Returns nothing; hands the state to the rule below."""
        self.rule.load_state_dict(state)
