"""Names and numbers for TensorBoard and wandb, letter by letter."""

import dataclasses
import math

from megatron_sorted.monitoring.report import EvaluationReport, ExitNumbers, StepReport
from megatron_sorted.monitoring.values import metric_values

REPORT = StepReport(
    step=30,
    total_steps=100,
    samples=960,
    learning_rate=1e-4,
    grad_norm=0.5,
    loss_scale=1.0,
    skipped=2,
    step_seconds=0.25,
    tokens_per_second=4096.0,
    seconds_left=17.5,
    nonfinite=1,
    samples_a_step=32,
    epoch=0.75,
    data_checksum=99,
    tokens_per_second_per_device=1024.0,
    tflops_per_device=150.5,
    mfu=0.48,
    memory_bytes=123456,
    phases={"data": 0.01, "forward": 0.1},
    exit_rule={"guard-multiplier": 0.25},
    exits={
        2: ExitNumbers(
            0.0,
            0.25,
            0.5,
            grad_norm=0.125,
            agreement=0.5,
            accept_length=1.75,
            kd=0.75,
            gradient_cosine=-0.5,
            gradient_ratio=3.0,
        ),
        4: ExitNumbers(math.log(8.0), 0.5, 1.0, agreement=1.0, accept_length=1.0),
    },
)


def test_names_of_a_step():
    values = metric_values(REPORT, last_depth=4)
    ppl = values.pop("exit_4/perplexity")
    assert abs(ppl - 8.0) < 1e-12
    assert values == {
        "lm loss": math.log(8.0),
        "learning-rate": 1e-4,
        "batch-size": 32.0,
        "grad-norm": 0.5,
        "loss-scale": 1.0,
        "skipped-steps": 2.0,
        "nonfinite-steps": 1.0,
        "iteration-time": 0.25,
        "throughput": 150.5,
        "mfu": 0.48,
        "tokens-per-second": 4096.0,
        "tokens-per-second-per-device": 1024.0,
        "mem-max-allocated-bytes": 123456.0,
        "samples vs steps": 960.0,
        "epoch": 0.75,
        "seconds-left": 17.5,
        "phase/data": 0.01,
        "phase/forward": 0.1,
        "exit-rule/guard-multiplier": 0.25,
        "exit_2/loss": 0.0,
        "exit_2/perplexity": 1.0,
        "exit_2/coefficient": 0.5,
        "exit_2/grad-norm": 0.125,
        "exit_2/token-accuracy": 0.25,
        "exit_2/agreement": 0.5,
        "exit_2/accept-length": 1.75,
        "exit_2/kd": 0.75,
        "exit_2/gradient-cosine": -0.5,
        "exit_2/gradient-ratio": 3.0,
        "exit_4/loss": math.log(8.0),
        "exit_4/coefficient": 1.0,
        "exit_4/token-accuracy": 0.5,
        "exit_4/agreement": 1.0,
        "exit_4/accept-length": 1.0,
    }
    assert all(type(value) is float for value in values.values())


def test_what_was_not_measured_is_left_out():
    bare = dataclasses.replace(
        REPORT,
        samples_a_step=0,
        epoch=0.0,
        tokens_per_second_per_device=0.0,
        tflops_per_device=0.0,
        mfu=None,
        memory_bytes=0,
        phases={},
        grad_norm=math.nan,
        exits={2: ExitNumbers(math.inf, 0.0)},
        exit_rule={},
    )
    # without the last exit, which was not drawn in these steps, there is no lm loss
    assert set(metric_values(bare, last_depth=4)) == {
        "learning-rate",
        "loss-scale",
        "skipped-steps",
        "nonfinite-steps",
        "iteration-time",
        "tokens-per-second",
        "samples vs steps",
        "seconds-left",
        "exit_2/token-accuracy",
    }


def test_perplexity_that_overflows_is_left_out():
    values = metric_values(
        dataclasses.replace(REPORT, exits={4: ExitNumbers(710.0, 0.0)}), last_depth=4
    )
    assert values["lm loss"] == 710.0 and "exit_4/perplexity" not in values


def test_names_of_an_evaluation():
    report = EvaluationReport(
        step=30,
        name="facts",
        seconds=1.0,
        num_tokens=7,
        exits={
            2: ExitNumbers(1.0, 0.25, exact_match=0.125),
            4: ExitNumbers(0.0, 0.5, agreement=1.0),
        },
    )
    exits = {
        "facts/exit_2/loss": 1.0,
        "facts/exit_2/perplexity": math.e,
        "facts/exit_2/token-accuracy": 0.25,
        "facts/exit_2/exact-match": 0.125,
        "facts/exit_4/loss": 0.0,
        "facts/exit_4/perplexity": 1.0,
        "facts/exit_4/token-accuracy": 0.5,
        "facts/exit_4/agreement": 1.0,
    }
    named = {"lm loss validation-facts": 0.0, "lm loss validation-facts ppl": 1.0}
    assert metric_values(report, last_depth=4) == named | exits
    assert metric_values(report, last_depth=4, main_set="other") == named | exits
    assert (
        metric_values(report, last_depth=4, main_set="facts")
        == {"lm loss validation": 0.0, "lm loss validation ppl": 1.0} | named | exits
    )
    assert metric_values(report, last_depth=6, main_set="facts") == exits
    averaged = dataclasses.replace(report, averaged={2: ExitNumbers(0.0, 0.375)})
    assert metric_values(averaged, last_depth=6) == exits | {
        "facts/averaged/exit_2/loss": 0.0,
        "facts/averaged/exit_2/perplexity": 1.0,
        "facts/averaged/exit_2/token-accuracy": 0.375,
    }
