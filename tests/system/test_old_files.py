"""Files of version 0.6.0 load unchanged: YAML, prepared data, a checkpoint, an export.

`tests/support/old_files` was made by that version's own tools (a network of 2 layers of width 16
with a norm of its own at exit 1, trained for 2 of 4 steps and, for the export, to the end);
`results.json` holds the numbers and texts that version computed.
"""

import json
import shutil
from pathlib import Path

import pytest

from megatron_sorted.data.indexed import open_indexed
from megatron_sorted.data.prepared import stored_options
from megatron_sorted.monitoring.json_lines import read_json_lines
from tests.support.command_line import pretrain
from tests.support.commands import run_command

FILES = Path(__file__).resolve().parents[1] / "support" / "old_files"
RESULTS = json.loads((FILES / "results.json").read_text())
ROUNDING = 1e-4
"""Relative; other processors and versions of torch round otherwise."""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a copy of the old files to work in."""
    return shutil.copytree(FILES, tmp_path / "old")


def test_a_run_resumes_from_its_checkpoint(folder):
    lines = pretrain(
        1, folder, "--config", "run.yaml", "--load", "save", "--metrics-file", "again.jsonl"
    )
    assert any(
        line.startswith("loaded save/iter_0000002: step 2, 4 samples consumed") for line in lines
    ), lines
    steps = {
        str(line["step"]): line
        for line in read_json_lines(folder / "again.jsonl")
        if line["kind"] == "train"
    }
    assert steps.keys() == RESULTS["steps"].keys() == {"3", "4"}
    for step, expected in RESULTS["steps"].items():
        assert steps[step]["data_checksum"] == expected["data_checksum"], "other samples"
        assert steps[step]["learning_rate"] == pytest.approx(expected["learning_rate"])
        losses = {depth: numbers["loss"] for depth, numbers in steps[step]["exits"].items()}
        assert losses == pytest.approx(expected["losses"], rel=ROUNDING)


def test_prepared_data_can_be_opened(folder):
    texts, questions = (
        open_indexed(str(folder / "data" / f"{name}_text_document"))
        for name in ("texts", "questions")
    )
    assert (texts.num_documents, texts.modes) == (59, None)
    assert questions.num_documents == 24 and 0 < questions.trained(0).sum() < len(
        questions.trained(0)
    )
    assert stored_options(str(folder / "data" / "texts_text_document"))["seq_length"] == 32


def test_an_export_is_read_unchanged(folder):
    done = run_command(
        "tools/evaluate.py",
        "model",
        "--text",
        "text.txt",
        "--seq-length",
        32,
        "--output",
        "results",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    exits = json.loads((folder / "results" / "evaluation.json").read_text())["texts"]["text"][
        "models"
    ]["model"]["exits"]
    losses = {depth: numbers["loss"] for depth, numbers in exits.items()}
    assert losses == pytest.approx(RESULTS["evaluation"], rel=ROUNDING)


def test_a_tuned_model_generates_with_its_decoding_json(folder):
    done = run_command(
        "tools/generate.py",
        "model",
        "--prompt",
        RESULTS["prompt"],
        "--max-new-tokens",
        16,
        "--colour",
        "never",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "self_speculative" in done.stderr and done.stdout == RESULTS["generated"]


def test_a_checkpoint_is_converted_to_the_same_model(folder):
    done = run_command("tools/convert.py", "export", "save", "again", cwd=folder)
    assert done.returncode == 0 and "verified" in done.stdout, done.stderr
    config, old = (
        json.loads((folder / name / "config.json").read_text()) for name in ("again", "model")
    )
    assert config == old
