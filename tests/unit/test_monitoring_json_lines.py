"""JSON lines: whole or not there, also after kills and on full disks."""

import dataclasses
import json
import os
import resource
import subprocess
import sys

import pytest

from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.monitoring.json_lines import (
    JsonLines,
    json_line,
    latest_lines,
    read_json_lines,
)
from megatron_sorted.monitoring.report import EvaluationReport, ExitNumbers
from tests.unit.test_monitoring_console import EVALUATION, STEP


def started(path) -> JsonLines:
    writer = JsonLines(path)
    writer.start()
    return writer


def test_lines_follow_those_of_the_run_before(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    for report in (STEP, EVALUATION):
        writer = started(path)
        writer.write(report)
        writer.close()
        assert writer.notes() == []
    train, evaluation = read_json_lines(str(path))
    assert (train.pop("kind"), evaluation.pop("kind")) == ("train", "evaluation")
    assert 1.6e9 < train.pop("time") <= evaluation.pop("time")
    exits = train.pop("exits")
    assert train == {
        "step": 20,
        "total_steps": 1000,
        "samples": 640,
        "learning_rate": 2.5e-4,
        "grad_norm": 1.234,
        "loss_scale": 1.0,
        "skipped": 0,
        "step_seconds": 0.2504,
        "tokens_per_second": 32768.4,
        "seconds_left": 245.0,
        "nonfinite": 0,
        "samples_a_step": 0,
        "epoch": 0.0,
        "data_checksum": 0,
        "tokens_per_second_per_device": 0.0,
        "tflops_per_device": 0.0,
        "mfu": None,
        "memory_bytes": 0,
        "phases": {},
        "exit_rule": {},
    }
    unmeasured = dict.fromkeys(
        ("grad_norm", "agreement", "accept_length", "kd", "gradient_cosine", "gradient_ratio")
    )
    perplexity = exits["8"].pop("perplexity")
    assert exits["8"] == {
        "loss": 2.3456,
        "token_accuracy": 0.5,
        "coefficient": 1.0,
        "exact_match": None,
        **unmeasured,
    }
    assert perplexity == pytest.approx(10.4395, abs=1e-4)  # e^2.3456
    assert evaluation["exits"]["12"].pop("perplexity") == pytest.approx(1.648721, abs=1e-6)
    assert evaluation["exits"]["12"] == {
        "loss": 0.5,
        "token_accuracy": 0.9,
        "coefficient": None,
        "exact_match": 1.0,
        **unmeasured,
    }


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    exits = {2: ExitNumbers(float("nan"), 0.0, 1.0), 8: ExitNumbers(800.0, 0.0, 1.0)}
    started(tmp_path / "m").write(dataclasses.replace(STEP, grad_norm=float("inf"), exits=exits))

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "m").read_text(), parse_constant=refuse)
    assert (
        line["grad_norm"] is None
        and line["exits"]["2"]["loss"] is None
        and line["exits"]["2"]["perplexity"] is None
    )
    assert (
        line["exits"]["8"]["loss"] == 800.0 and line["exits"]["8"]["perplexity"] is None
    )  # e^800 is above every double


def test_no_trained_token_is_null_and_not_a_loss_of_0():
    exits = json.loads(
        json.dumps(json_line(dataclasses.replace(STEP, exits={2: ExitNumbers(None, None)})))
    )["exits"]
    assert (
        exits["2"]["loss"] is None
        and exits["2"]["perplexity"] is None
        and exits["2"]["token_accuracy"] is None
    )


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize(
    "torn", [b"{", b'{"kind": "train", "step": 5', b'{"x": "' + b"y" * 200_000]
)
def test_a_torn_line_is_moved_away(tmp_path, torn, before):
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(b'{"kind": "train", "step": %d}\n' % step for step in range(before))
    path.write_bytes(whole + torn)
    assert [line["step"] for line in read_json_lines(path)] == list(
        range(before)
    )  # readers do not mind
    writer = started(path)
    assert (
        path.read_bytes() == whole
        and (tmp_path / "metrics.jsonl.torn").read_bytes() == torn + b"\n"
    )
    assert writer.notes() == [
        f"{path}: its last line was torn ({len(torn)} bytes) when an earlier run ended; moved to "
        f"{path}.torn"
    ]
    assert writer.notes() == []
    writer.write(STEP)
    assert [line["step"] for line in read_json_lines(path)] == [*range(before), 20]


def test_a_line_is_one_write(tmp_path, monkeypatch):
    sizes, write = [], os.write
    monkeypatch.setattr(
        os, "write", lambda file, data: sizes.append(len(data)) or write(file, data)
    )
    path = tmp_path / "m"
    started(path).write(STEP)
    assert sizes == [path.stat().st_size]


def test_a_disk_that_fills_up_in_a_line_leaves_whole_lines(tmp_path):
    # a limit on file sizes stops a write in the middle as a full disk does; in a new process, since
    # the limit applies to the whole process
    code = f"""
import resource, signal
from megatron_sorted.monitoring.json_lines import JsonLines
from tests.unit.test_monitoring_console import STEP
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = JsonLines({str(tmp_path / "m")!r})
writer.start()
writer.write(STEP)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
try:
    writer.write(STEP)
except OSError as error:
    print(error.strerror)
resource.setrlimit(resource.RLIMIT_FSIZE, ({resource.RLIM_INFINITY}, {resource.RLIM_INFINITY}))
writer.write(STEP)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "no space left for a whole line\n"
    assert len(read_json_lines(tmp_path / "m")) == 2 and (tmp_path / "m").read_bytes().endswith(
        b"\n"
    )


def test_files_that_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        SettingsError,
        match=r"--metrics-file: cannot write .*file/m .*Give a file that can be written",
    ):
        started(tmp_path / "file" / "m")
    with pytest.raises(DataError, match="No such file"):
        read_json_lines(tmp_path / "absent")
    path = tmp_path / "m"
    path.write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(DataError, match="m:2: not_json"):
        read_json_lines(path)
    path.write_text("1\n")
    with pytest.raises(DataError, match="m:1: not an object"):
        read_json_lines(path)
    path.write_text("")
    assert read_json_lines(path) == []


def line(kind: str, step: int, mark: int, name: str = "set") -> dict:
    return {"kind": kind, "step": step, "mark": mark} | (
        {"name": name} if kind == "evaluation" else {}
    )


def test_latest_lines_are_those_of_the_last_attempt():
    lines = [
        line("train", 10, 0),
        line("evaluation", 10, 0),
        line("train", 20, 0),
        line("evaluation", 20, 0),
        line("train", 30, 0),
        line("evaluation", 30, 0),
        line("train", 25, 1),
        line("train", 35, 1),
        line("evaluation", 35, 1),  # back to 20, with another interval
        line("train", 30, 2),
        line("train", 40, 2),  # and again
        line("evaluation", 20, 3),
    ]  # evaluated again, on its own
    assert [(line["kind"][0], line["step"], line["mark"]) for line in latest_lines(lines)] == [
        ("t", 10, 0),
        ("e", 10, 0),
        ("t", 20, 0),
        ("t", 25, 1),
        ("t", 30, 2),
        ("t", 40, 2),
        ("e", 20, 3),
    ]
    assert latest_lines([]) == []


def test_latest_lines_of_a_long_run_take_little_time():
    lines = [line("train", step, 0) for step in range(1, 100_001)]
    assert latest_lines(lines) == lines


def test_json_line_leaves_the_report_as_it_is():
    json_line(STEP)
    assert "perplexity" not in dataclasses.asdict(STEP)["exits"][8]


def test_averaged_weights_have_an_entry_where_they_were_evaluated():
    report = EvaluationReport(3, "facts", 1.0, 7, {2: ExitNumbers(1.0, 0.5)})
    assert "averaged" not in json_line(report)
    averaged = dataclasses.replace(report, averaged={2: ExitNumbers(0.0, 0.75)})
    assert json_line(averaged)["averaged"][2]["loss"] == 0.0
    assert json_line(averaged)["averaged"][2]["perplexity"] == 1.0
    assert json_line(averaged)["exits"][2]["loss"] == 1.0
