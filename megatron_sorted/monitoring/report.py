"""What a run has to say, as plain data; writers turn it into lines."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExitNumbers:
    """One exit: mean loss (nats a token), share of trained tokens predicted right, and its coefficient (None in evaluation)."""

    loss: float
    token_accuracy: float
    coefficient: float | None = None
    exact_match: float | None = None


@dataclass(frozen=True)
class StepReport:
    """The steps since the last report.

    Attributes:
        step: Steps done.
        total_steps: Of the run.
        samples: Samples consumed so far.
        learning_rate: Of the last step.
        grad_norm: Of the last step, before clipping.
        loss_scale: Of fp16, else 1.
        skipped: Steps that the optimizer skipped since the last report.
        step_seconds: Mean duration of a step.
        tokens_per_second: All positions of all samples, over all processes.
        seconds_left: Estimate of the time left.
        exits: By depth.
    """

    step: int
    total_steps: int
    samples: int
    learning_rate: float
    grad_norm: float
    loss_scale: float
    skipped: int
    step_seconds: float
    tokens_per_second: float
    seconds_left: float
    exits: dict[int, ExitNumbers]


@dataclass(frozen=True)
class EvaluationReport:
    """Every exit on one set."""

    step: int
    name: str
    seconds: float
    num_tokens: int
    exits: dict[int, ExitNumbers]
