"""COSEE's simulated exit: a rule that weighs an exit by how many tokens would leave there.

It counts tokens rather than samples, and uses those of the step before.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sorted.exits.chance import uniform_number
from megatron_sorted.exits.coefficients import EXIT_LAYERS, LOSSES, Observation
from megatron_sorted.exits.learned import LearnedRule


class SimulatedExit(LearnedRule):
    """Weighting by simulated exits: exits near to where tokens leave count more.

    A token leaves at the shallowest exit whose confidence (probability of the most likely token)
    exceeds a threshold. At each step some thresholds are drawn uniformly between the smallest and
    the largest confidence of the step before. With m_e the share of tokens that leave at exit e,
    averaged over thresholds, and exits numbered one after another, exit l has the coefficient

        sum_e m_e softmax_l(-b |e - l|),        b = sharpness * step / total_steps

    COSEE weighs the loss of each sample by itself in the same step. Here exits are computed from
    deep to shallow on several stages, each before any rank knows where a token leaves; so the
    shares of the step before give the coefficients for all tokens.

    Source: COSEE, He et al., arXiv 2412.13236 (sharpness 10, 5 thresholds), and its code,
        sample_weights_scheduler.py.
    """

    name = "simulated_exit"
    tables = ("shares",)
    plain = ("lowest", "highest")

    def __init__(
        self,
        depths: Sequence[int],
        total_steps: int,
        sharpness: float,
        num_thresholds: int,
        seed: int,
    ):
        super().__init__(depths)
        self.total_steps, self.sharpness = total_steps, sharpness
        self.num_thresholds, self.seed = num_thresholds, seed
        self.shares = dict.fromkeys(self.depths, 1 / len(self.depths))
        self.lowest, self.highest = 0.0, 1.0

    @property
    def needs(self) -> frozenset[str]:
        """Return losses, and the shares of tokens that would leave at each exit."""
        return frozenset({LOSSES, EXIT_LAYERS})

    def thresholds(self, step: int) -> tuple[float, ...]:
        """Return the thresholds drawn for a step, increasing."""
        width = self.highest - self.lowest
        return tuple(
            sorted(
                self.lowest + width * uniform_number(f"exit threshold {self.seed}/{step}/{number}")
                for number in range(self.num_thresholds)
            )
        )

    def coefficients(self, step: int) -> dict[int, float]:
        """Return the mixture of the class's formula; equal coefficients at step 0, where b is 0."""
        slope = self.sharpness * min(step / self.total_steps, 1.0)
        result = dict.fromkeys(self.depths, 0.0)
        for place, leaving in enumerate(self.depths):
            near = [math.exp(-slope * abs(place - other)) for other in range(len(self.depths))]
            for depth, weight in zip(self.depths, near, strict=True):
                result[depth] += self.shares[leaving] * weight / sum(near)
        return result

    def observe(self, step: int, seen: Observation) -> None:
        """Record the shares and the range of confidences."""
        self.shares = {depth: seen.exit_shares.get(depth, 0.0) for depth in self.depths}
        self.lowest, self.highest = seen.confidences

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of the same exits; ignore another, whose shares would not sum to 1."""
        state = state.get("below", state)  # saved under a guard
        if {int(depth) for depth in state.get("shares", {})} == set(self.depths):
            super().load_state_dict(state)
