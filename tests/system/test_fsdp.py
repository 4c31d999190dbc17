"""Runs with ``--data-parallel fsdp``: evaluated, stopped, resumed on more ranks, exported."""

import shutil
from pathlib import Path

import pytest

from megatron_sorted.monitoring.json_lines import read_json_lines
from tests.support.command_line import pretrain
from tests.system.test_pretrain import untimed

ONE_STAGE = (
    "--config",
    "run.yaml",
    "--pipeline-model-parallel-size",
    1,
    "--micro-batch-size",
    1,
    "--lr-warmup-iters",
    2,
)
FSDP = ("--data-parallel", "fsdp")


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    """Return a folder with data and settings."""
    shutil.copytree(prepared / "data", tmp_path / "data")
    shutil.copy(prepared / "run.yaml", tmp_path)
    return tmp_path


def lines_of(folder: Path, save: str) -> list[dict]:
    """Return a run's reports, without values that depend on the clock."""
    return [untimed(line) for line in read_json_lines(folder / save / "metrics.jsonl")]


def losses(report: dict) -> dict:
    """Return {exit: loss} of a report."""
    return {depth: numbers["loss"] for depth, numbers in report["exits"].items()}


def test_a_run_is_stopped_and_resumed_and_equals_ddp(folder):
    pretrain(2, folder, *ONE_STAGE, "--use-distributed-optimizer", "--save", "ddp")
    pretrain(2, folder, *ONE_STAGE, *FSDP, "--save", "whole")
    ddp, whole = lines_of(folder, "ddp"), lines_of(folder, "whole")
    assert len(whole) == len(ddp) == 8, "four steps, and two sets at steps 2 and 4"
    for ours, theirs in zip(whole, ddp, strict=True):
        assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
        assert ours.get("learning_rate") == theirs.get("learning_rate")
    pretrain(2, folder, *ONE_STAGE, *FSDP, "--save", "parts", "--exit-interval", 2)
    shutil.copytree(folder / "parts", folder / "wider")
    pretrain(2, folder, *ONE_STAGE, *FSDP, "--save", "parts", "--load", "parts")
    assert lines_of(folder, "parts")[-5:] == whole[-5:], (
        "two steps and two evaluations, bit for bit"
    )
    lines = pretrain(4, folder, *ONE_STAGE, *FSDP, "--save", "wider", "--load", "wider")
    assert any(line.startswith("loaded wider/iter_0000002: step 2, ") for line in lines)
    assert losses(lines_of(folder, "wider")[-1]) == pytest.approx(losses(whole[-1]), rel=1e-5)
    pretrain(
        1,
        folder,
        *ONE_STAGE,
        "--use-distributed-optimizer",
        "--load",
        "parts",
        "--train-iters",
        6,
        "--save",
        "on",
    )
    assert lines_of(folder, "on")[0]["step"] == 5


def test_a_run_starts_from_a_hugging_face_directory_and_ends_in_one(folder):
    arguments = (
        *ONE_STAGE,
        *FSDP,
        "--swiglu",
        "--disable-bias-linear",
        "--normalization",
        "RMSNorm",
    )
    lines = pretrain(2, folder, *arguments, "--save", "run", "--save-hf", "out")
    assert any(line.startswith("wrote out; verified: ") for line in lines)
    pretrain(4, folder, *ONE_STAGE, *FSDP, "--load", "out", "--save", "again", "--skip-train")
    evaluated = {line["name"]: losses(line) for line in lines_of(folder, "again")}
    expected = {
        line["name"]: losses(line)
        for line in lines_of(folder, "run")
        if line["kind"] == "evaluation" and line["step"] == 4
    }
    assert evaluated.keys() == expected.keys() and len(expected) == 2
    for name, exits in expected.items():
        assert evaluated[name] == pytest.approx(exits, rel=1e-5)
