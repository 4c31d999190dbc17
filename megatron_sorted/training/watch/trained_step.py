"""What is known of a step that was taken, for those who look at every step."""

from dataclasses import dataclass
from typing import Protocol

from megatron_sorted.exits.coefficients import Observation


@dataclass(frozen=True)
class StepResult:
    """What became of a step.

    Attributes:
        stepped: Whether the optimizer stepped.
        grad_norm: Global gradient norm before clipping; NaN where fp16 overflowed.
        not_finite: Where a loss or gradient was NaN or infinite, in words; None for a good step and
            for fp16 overflow, which the loss scale answers.
        observed: What the rule of the coefficients learns from; None where it does not learn, and
            of a step that was left out.
    """

    stepped: bool
    grad_norm: float
    not_finite: str | None = None
    observed: Observation | None = None


@dataclass(frozen=True)
class Flags:
    """What one rank reports, or after the exchange the largest value that any rank reported.

    Attributes:
        stop_signal: Number of a stop signal received, or 0.
        time_is_up: 1 once --exit-duration-in-mins has passed.
        save_busy: 1 while a save in the background is on its way.
    """

    stop_signal: int = 0
    time_is_up: int = 0
    save_busy: int = 0


@dataclass(frozen=True)
class TrainedStep:
    """One step of a run, after the optimizer.

    Attributes:
        number: Steps done, this one included.
        samples: Samples consumed so far.
        result: What became of it.
        reports: Whether it ends with a report.
        is_last: Whether it is the run's last.
        flags: What any rank reported during it.
    """

    number: int
    samples: int
    result: StepResult
    reports: bool
    is_last: bool
    flags: Flags


class Observer(Protocol):
    """Looks at every step, at the same place on all ranks."""

    def after(self, step: TrainedStep) -> None:
        """Look at a step that was taken."""
