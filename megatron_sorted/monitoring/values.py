"""A report as names and numbers, for TensorBoard and Weights & Biases.

Names are Megatron-LM's where it has them.
"""

import math

from megatron_sorted.monitoring.report import EvaluationReport, ExitNumbers, StepReport

EXIT_NUMBERS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "coefficient": "coefficient",
    "grad-norm": "grad_norm",
    "token-accuracy": "token_accuracy",
    "exact-match": "exact_match",
    "agreement": "agreement",
    "accept-length": "accept_length",
    "kd": "kd",
    "gradient-cosine": "gradient_cosine",
    "gradient-ratio": "gradient_ratio",
}
"""Name of a number of an exit -> attribute of `ExitNumbers`."""


def metric_values(
    report: StepReport | EvaluationReport, last_depth: int, main_set: str | None = None
) -> dict[str, float]:
    """Return {name: number} of a report.

    Numbers that were not measured (None, or 0 where 0 is impossible), NaN and infinity are left
    out: the curve has a gap there, and ``nonfinite-steps`` counts the steps.

    Args:
        report: Report of steps or of one evaluation set.
        last_depth: The depth whose loss is Megatron's ``lm loss``; the report may lack it.
        main_set: The evaluation set whose loss is Megatron's ``lm loss validation`` without suffix.
    """
    values = (
        _of_steps(report, last_depth)
        if isinstance(report, StepReport)
        else _of_evaluation(report, last_depth, main_set)
    )
    return {
        name: float(value)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }


def _of_steps(report: StepReport, last_depth: int) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    if last_depth in report.exits:
        values["lm loss"] = report.exits[last_depth].loss
    values |= {
        "learning-rate": report.learning_rate,
        "batch-size": report.samples_a_step or None,
        "grad-norm": report.grad_norm,
        "loss-scale": report.loss_scale,
        "skipped-steps": report.skipped,
        "nonfinite-steps": report.nonfinite,
        "iteration-time": report.step_seconds,
        "throughput": report.tflops_per_device or None,
        "mfu": report.mfu,
        "tokens-per-second": report.tokens_per_second,
        "tokens-per-second-per-device": report.tokens_per_second_per_device or None,
        "mem-max-allocated-bytes": report.memory_bytes or None,
        "samples vs steps": report.samples,
        "epoch": report.epoch or None,
        "seconds-left": report.seconds_left,
    }
    values |= {f"phase/{name}": seconds for name, seconds in report.phases.items()}
    values |= {f"exit-rule/{name}": value for name, value in report.exit_rule.items()}
    return values | _of_exits(report.exits, "")


def _of_evaluation(
    report: EvaluationReport, last_depth: int, main_set: str | None
) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    if last_depth in report.exits:
        last = report.exits[last_depth]
        for suffix in ("", f"-{report.name}") if report.name == main_set else (f"-{report.name}",):
            values |= {
                f"lm loss validation{suffix}": last.loss,
                f"lm loss validation{suffix} ppl": last.perplexity,
            }
    return (
        values
        | _of_exits(report.exits, f"{report.name}/")
        | _of_exits(report.averaged, f"{report.name}/averaged/")
    )


def _of_exits(exits: dict[int, ExitNumbers], prefix: str) -> dict[str, float | None]:
    return {
        f"{prefix}exit_{depth}/{name}": getattr(numbers, attribute)
        for depth, numbers in sorted(exits.items())
        for name, attribute in EXIT_NUMBERS.items()
    }
