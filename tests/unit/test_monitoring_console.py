"""The lines people read, letter by letter."""

import dataclasses
import json

import pytest

from megatron_sorted.monitoring.console import duration, evaluation_lines, step_line
from megatron_sorted.monitoring.json_lines import JsonLines
from megatron_sorted.monitoring.report import EvaluationReport, ExitNumbers, StepReport

STEP = StepReport(
    step=20, total_steps=1000, samples=640, learning_rate=2.5e-4, grad_norm=1.234, loss_scale=1.0, skipped=0, step_seconds=0.2504,
    tokens_per_second=32768.4, seconds_left=245.0,
    exits={8: ExitNumbers(2.3456, 0.5, 1.0), 2: ExitNumbers(10.9991, 0.25, 0.1)})
EVALUATION = EvaluationReport(
    step=20, name="facts", seconds=61.2, num_tokens=12345,
    exits={12: ExitNumbers(0.5, 0.9, exact_match=1.0), 2: ExitNumbers(12.3456, 0.12345, exact_match=0.0005)})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.5, "1s"), (59.4, "59s"), (59.5, "1m00s"), (190, "3m10s"), (3599.4, "59m59s"), (3600, "1h00m"), (90061, "25h01m")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_step_line():
    assert step_line(STEP) == (
        "step   20/1000  loss @2 10.999  @8 2.346  lr 2.50e-04  grad norm 1.23  250 ms/step  32,768 tokens/s  4m05s left")


def test_step_line_of_half_precision_names_scale_and_skipped_steps():
    report = dataclasses.replace(STEP, loss_scale=65536.0, skipped=3, exits={8: ExitNumbers(float("nan"), 0.0, 1.0)})
    assert step_line(report) == (
        "step   20/1000  loss @8 nan  lr 2.50e-04  grad norm 1.23  scale 65536  3 skipped  250 ms/step  32,768 tokens/s  4m05s left")


def test_evaluation_table():
    assert evaluation_lines(EVALUATION).splitlines() == [
        "evaluation of 'facts' at step 20: 12,345 tokens, 1m01s",
        "   exit    loss  tokens right  exact match",
        "      2  12.346        12.3 %        0.1 %",
        "     12   0.500        90.0 %      100.0 %"]
    text = dataclasses.replace(EVALUATION, exits={2: ExitNumbers(1.0, 0.5)})
    assert evaluation_lines(text).splitlines()[-1] == "      2   1.000        50.0 %            -"


def test_json_lines_follow_those_of_the_run_before(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    JsonLines(path).write(STEP)
    JsonLines(str(path)).write(EVALUATION)
    train, evaluation = (json.loads(line) for line in path.read_text().splitlines())
    assert (train.pop("kind"), evaluation.pop("kind")) == ("train", "evaluation")
    assert 1.6e9 < train.pop("time") <= evaluation.pop("time")
    exits = train.pop("exits")
    assert train == {
        "step": 20, "total_steps": 1000, "samples": 640, "learning_rate": 2.5e-4, "grad_norm": 1.234, "loss_scale": 1.0, "skipped": 0,
        "step_seconds": 0.2504, "tokens_per_second": 32768.4, "seconds_left": 245.0, "nonfinite": 0,
        "samples_a_step": 0, "epoch": 0.0, "data_checksum": 0,
        "tokens_per_second_per_device": 0.0, "tflops_per_device": 0.0, "mfu": None, "memory_bytes": 0, "phases": {}}
    unmeasured = {"grad_norm": None, "agreement": None, "accept_length": None}
    assert exits["2"] == {"loss": 10.9991, "token_accuracy": 0.25, "coefficient": 0.1, "exact_match": None, **unmeasured}
    assert evaluation["exits"]["12"] == {"loss": 0.5, "token_accuracy": 0.9, "coefficient": None, "exact_match": 1.0, **unmeasured}


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    JsonLines(tmp_path / "m").write(dataclasses.replace(STEP, grad_norm=float("inf"), exits={8: ExitNumbers(float("nan"), 0.0, 1.0)}))

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "m").read_text(), parse_constant=refuse)
    assert line["grad_norm"] is None and line["exits"]["8"]["loss"] is None
