"""The lines people read, letter by letter."""

import dataclasses

import pytest

from megatron_sorted.monitoring.console import duration, evaluation_lines, step_line
from megatron_sorted.monitoring.report import EvaluationReport, ExitNumbers, StepReport

STEP = StepReport(
    step=20,
    total_steps=1000,
    samples=640,
    learning_rate=2.5e-4,
    grad_norm=1.234,
    loss_scale=1.0,
    skipped=0,
    step_seconds=0.2504,
    tokens_per_second=32768.4,
    seconds_left=245.0,
    exits={8: ExitNumbers(2.3456, 0.5, 1.0), 2: ExitNumbers(10.9991, 0.25, 0.1)},
)
EVALUATION = EvaluationReport(
    step=20,
    name="facts",
    seconds=61.2,
    num_tokens=12345,
    exits={
        12: ExitNumbers(0.5, 0.9, exact_match=1.0),
        2: ExitNumbers(12.3456, 0.12345, exact_match=0.0005),
    },
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.5, "1s"),
        (59.4, "59s"),
        (59.5, "1m00s"),
        (190, "3m10s"),
        (3599.4, "59m59s"),
        (3600, "1h00m"),
        (90061, "25h01m"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_step_line():
    assert step_line(STEP) == (
        "step   20/1000  loss @2 10.999  @8 2.346  lr 2.50e-04  grad norm 1.23  250 ms/step  "
        "32,768 tokens/s  4m05s left"
    )


def test_step_line_of_half_precision_names_scale_and_skipped_steps():
    report = dataclasses.replace(
        STEP, loss_scale=65536.0, skipped=3, exits={8: ExitNumbers(float("nan"), 0.0, 1.0)}
    )
    assert step_line(report) == (
        "step   20/1000  loss @8 nan  lr 2.50e-04  grad norm 1.23  scale 65536  3 skipped  250 "
        "ms/step  32,768 tokens/s  4m05s left"
    )


def test_evaluation_table():
    assert evaluation_lines(EVALUATION).splitlines() == [
        "evaluation of 'facts' at step 20: 12,345 tokens, 1m01s",
        "   exit    loss  tokens right  exact match",
        "      2  12.346        12.3 %        0.1 %",
        "     12   0.500        90.0 %      100.0 %",
    ]
    text = dataclasses.replace(EVALUATION, exits={2: ExitNumbers(1.0, 0.5)})
    assert evaluation_lines(text).splitlines()[-1] == "      2   1.000        50.0 %            -"


def test_what_has_no_trained_token_has_no_loss():
    nothing = ExitNumbers(None, None)
    assert "loss @2 none  @8 2.346" in step_line(
        dataclasses.replace(STEP, exits={2: nothing, 8: STEP.exits[8]})
    )
    rows = evaluation_lines(
        dataclasses.replace(EVALUATION, num_tokens=0, exits={2: nothing})
    ).splitlines()
    assert rows[-1] == "      2    none             -            -"


def test_device_numbers_follow_where_they_are_known():
    report = dataclasses.replace(
        STEP,
        skipped=3,
        nonfinite=2,
        tflops_per_device=312.44,
        mfu=0.3159,
        memory_bytes=61 * 2**30 + 2**29,
    )
    assert step_line(report) == (
        "step   20/1000  loss @2 10.999  @8 2.346  lr 2.50e-04  grad norm 1.23  3 skipped (2 not "
        "finite)  250 ms/step  32,768 tokens/s  "
        "4m05s left  312 TFLOP/s  MFU 31.6 %  61.5 GiB"
    )


def test_evaluation_table_with_drafts():
    exits = {
        2: ExitNumbers(1.0, 0.5, agreement=0.456, accept_length=2.345),
        4: ExitNumbers(0.5, 0.75, agreement=1.0),
    }
    assert evaluation_lines(dataclasses.replace(EVALUATION, exits=exits)).splitlines()[1:] == [
        "   exit    loss  tokens right  exact match  agreement  accept length",
        "      2   1.000        50.0 %            -     45.6 %           2.35",
        "      4   0.500        75.0 %            -    100.0 %              -",
    ]


def test_evaluation_table_with_averaged_weights():
    exits = {2: ExitNumbers(1.0, 0.5), 4: ExitNumbers(0.5, 0.75)}
    averaged = {2: ExitNumbers(0.9, 0.55), 4: ExitNumbers(None, None)}
    report = dataclasses.replace(EVALUATION, exits=exits, averaged=averaged)
    assert evaluation_lines(report).splitlines()[1:] == [
        "   exit    loss  tokens right  exact match  averaged: loss  tokens right",
        "      2   1.000        50.0 %            -           0.900        55.0 %",
        "      4   0.500        75.0 %            -            none             -",
    ]
