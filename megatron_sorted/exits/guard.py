"""A guard that holds the full model's loss to a reference, on top of any rule."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sorted.exits.coefficients import LOSSES, Observation, RuleOnTop


@dataclass
class Guard(RuleOnTop):
    """A multiplier added to the last exit's coefficient while its loss exceeds a reference.

    Minimise sum c_i L_i subject to L_last <= reference + margin. The Lagrangian is
    sum c_i L_i + m (L_last - reference - margin), and dual ascent moves

        m <- clip(m + rate * (moving mean of L_last - reference - margin), 0, largest)

    The upper limit keeps m from growing without end when training starts from random weights, far
    above the reference. Where coefficients are shares, they are divided to sum 1 again.

    Source: dual ascent, Boyd and Vandenberghe, Convex Optimization, section 5; with stochastic
        constraints e.g. Eisen et al., arXiv 1807.08088.

    Attributes:
        last: Depth of the last exit.
        reference: Loss to hold, in nats a token, with ``margin`` already added.
        rate: Rate of the ascent.
        decay: Decay of the moving mean.
        largest: Upper limit of the multiplier.
        multiplier: Current multiplier m.
        average: Moving mean of the last exit's loss; None until it has trained.
    """

    last: int
    reference: float
    rate: float
    decay: float
    largest: float
    multiplier: float = field(default=0.0, init=False)
    average: float | None = field(default=None, init=False)

    @property
    def needs(self) -> frozenset[str]:
        """Return the losses and what the rule below needs."""
        return super().needs | {LOSSES}

    def coefficients(self, step: int) -> dict[int, float]:
        """Return the coefficients of the rule below, with the multiplier added to the last exit's.

        Shares are divided by 1 + multiplier.
        """
        below = self.rule.coefficients(step)
        below[self.last] += self.multiplier
        total = 1 + self.multiplier if self.normalised else 1.0
        return {depth: coefficient / total for depth, coefficient in below.items()}

    def observe(self, step: int, seen: Observation) -> None:
        """Take one step of the ascent if the last exit trained."""
        super().observe(step, seen)
        loss = seen.losses.get(self.last)
        if loss is None:
            return
        self.average = (
            loss if self.average is None else self.decay * self.average + (1 - self.decay) * loss
        )
        self.multiplier = min(
            max(self.multiplier + self.rate * (self.average - self.reference), 0.0), self.largest
        )

    def numbers(self) -> dict[str, float]:
        """Return the multiplier and the numbers of the rule below."""
        return {**super().numbers(), "guard-multiplier": self.multiplier}

    def state_dict(self) -> dict[str, Any]:
        """Return multiplier, mean and the state of the rule below."""
        return {
            "below": super().state_dict(),
            "guard": {"multiplier": self.multiplier, "average": self.average},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that was saved with or without a guard."""
        super().load_state_dict(state.get("below", state))
        if "guard" in state:
            self.multiplier, self.average = state["guard"]["multiplier"], state["guard"]["average"]
