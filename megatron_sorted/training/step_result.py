"""The result of a step, and the interface of those that observe every step."""

from dataclasses import dataclass
from typing import Protocol

from megatron_sorted.exits.coefficients import Observation


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step.

    Attributes:
        stepped: Whether the optimizer stepped.
        grad_norm: Global gradient norm before clipping; NaN where fp16 overflowed.
        not_finite: A text that names the loss or gradient that was NaN or infinite; None for a
            good step and for fp16 overflow, to which the loss scale adapts.
        observed: The observation for a learned coefficient rule; None for other rules and for a
            skipped step.
    """

    stepped: bool
    grad_norm: float
    not_finite: str | None = None
    observed: Observation | None = None


@dataclass(frozen=True)
class Flags:
    """One rank's flags or, after the exchange, the largest value of each over all ranks.

    Attributes:
        stop_signal: Number of a stop signal received, or 0.
        time_is_up: 1 once --exit-duration-in-mins has passed, else 0.
        save_busy: 1 while a save in the background has not ended, else 0.
    """

    stop_signal: int = 0
    time_is_up: int = 0
    save_busy: int = 0


@dataclass(frozen=True)
class TrainedStep:
    """One step of a run, after the optimizer.

    Attributes:
        number: Number of steps done, this one included.
        samples: Number of samples consumed so far.
        result: The result of the optimizer step.
        reports: Whether the step ends with a report.
        is_last: Whether it is the run's last step.
        flags: The flags of all ranks during it.
    """

    number: int
    samples: int
    result: StepResult
    reports: bool
    is_last: bool
    flags: Flags


class Observer(Protocol):
    """An object that is called after every step, in the same order on all ranks."""

    def after(self, step: TrainedStep) -> None:
        """Observe a step that was taken."""
