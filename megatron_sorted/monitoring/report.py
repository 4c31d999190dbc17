"""The numbers that a run reports, as plain data for writers."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ExitNumbers:
    """The numbers of one exit; None where a number was not measured.

    Attributes:
        loss: Mean loss in nats per token: over all trained tokens, or with
            --no-calculate-per-token-loss over the means of micro-batches that have trained tokens.
            None where no token was trained.
        token_accuracy: Share of trained tokens predicted correctly; None likewise.
        coefficient: Coefficient of the exit's loss; None in evaluation.
        exact_match: Share of documents with every trained token predicted correctly, which is what
            greedy decoding from the prompt would reproduce; None where documents were not counted.
        grad_norm: Norm, over all tokens of the global batch, of the gradient that the exit's own
            loss (with its coefficient) sends into the hidden state below it; over several steps
            the root mean square of the steps in which it trained.
        agreement: Share of trained tokens for which the exit and the last exit have the same most
            likely token; where it learns its teacher's choices, the exit and this teacher.
        accept_length: Mean number of tokens gained by one verification when this exit drafts and
            the last one verifies (1 for the last exit itself).
        kd: Mean KL divergence from its teacher (the last exit or a frozen model), in nats per
            token; from its choices, the cross entropy on these, where it learns them.
        gradient_cosine: Cosine between the gradient of its own loss and that of all deeper exits,
            in the layers below it, both as one vector over all tokens of the global batch; None
            where one is 0.
        gradient_ratio: Norm of the first gradient over that of the second.
    """

    loss: float | None
    token_accuracy: float | None
    coefficient: float | None = None
    exact_match: float | None = None
    grad_norm: float | None = None
    agreement: float | None = None
    accept_length: float | None = None
    kd: float | None = None
    gradient_cosine: float | None = None
    gradient_ratio: float | None = None

    @property
    def perplexity(self) -> float | None:
        """Return exp(loss); infinity where that overflows, None without a loss."""
        if self.loss is None:
            return None
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class StepReport:
    """The numbers of the steps since the last report.

    Attributes:
        step: Number of completed steps.
        total_steps: Steps of the whole run.
        samples: Samples used so far.
        learning_rate: Learning rate of the last step.
        grad_norm: Gradient norm of the last step, before clipping.
        loss_scale: Loss scale of fp16, else 1.
        skipped: Steps the optimizer skipped since the last report: fp16 overflow and
            ``nonfinite`` ones.
        nonfinite: Steps skipped since the last report because a loss or gradient was not finite.
        step_seconds: Mean duration of a step.
        tokens_per_second: Throughput of all processes; every position of a sample counts.
        seconds_left: Estimate of the time left.
        exits: Numbers of every exit, by depth.
        samples_a_step: Global batch size.
        epoch: Passes over the training data so far, with fraction.
        data_checksum: Sum over the samples since the last report of a checksum of their tokens:
            equal for equal data in equal steps.
        tokens_per_second_per_device: Throughput of one process.
        tflops_per_device: 10^12 operations per second of one process; heads of exits are counted,
            recomputation is not.
        mfu: Model FLOPs utilization, ``tflops_per_device`` over the device's peak; None where the
            peak is unknown.
        memory_bytes: Largest memory use so far, over all processes.
        phases: Mean seconds of each phase of a step, by name; empty unless requested.
        exit_rule: Further numbers of the coefficient rule after the last step, by name:
            "guard-multiplier".
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
    nonfinite: int = 0
    samples_a_step: int = 0
    epoch: float = 0.0
    data_checksum: int = 0
    tokens_per_second_per_device: float = 0.0
    tflops_per_device: float = 0.0
    mfu: float | None = None
    memory_bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    exit_rule: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationReport:
    """The numbers of every exit on one evaluation set.

    Attributes:
        step: Number of completed steps.
        name: The set's name.
        seconds: Duration of the evaluation, of both kinds of weights together.
        num_tokens: Number of evaluated tokens.
        exits: Numbers of every exit with the weights of this step, by depth.
        averaged: The same with averaged weights; empty where they were not evaluated.
    """

    step: int
    name: str
    seconds: float
    num_tokens: int
    exits: dict[int, ExitNumbers]
    averaged: dict[int, ExitNumbers] = field(default_factory=dict)
