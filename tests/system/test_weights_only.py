"""A run that starts from weights alone: its log, its carried files, and how it resumes."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_sorted.checkpoint.manifest import read_manifest
from megatron_sorted.monitoring.json_lines import read_json_lines
from tests.support.command_line import pretrain
from tests.support.weights_only import strip_to_weights

RUN = (
    "--config",
    "run.yaml",
    "--eval-interval",
    "none",
    "--valid-data-path",
    "--split",
    "100,0",
    "--pipeline-model-parallel-size",
    1,
)
FILES = {
    "huggingface/config.json": b'{"model_type": "llama"}',
    "huggingface/generation_config.json": b"{}",
    "tokenizer/chat_template.jinja": b"{{ messages }}",
}
FORM = "tokenizer/prompt_form.json"
STARTED = "weights only (it holds nothing else), starting at step 0"


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """Return a folder of its own with data, settings, and weights alone in ``imported``."""
    source, _ = trained
    shutil.copytree(source / "data", tmp_path / "data")
    shutil.copy(source / "run.yaml", tmp_path)
    (tmp_path / "imported").mkdir()
    strip_to_weights(source / "whole" / "iter_0000004", tmp_path / "imported", more_files=FILES)
    return tmp_path


def carried(directory: Path) -> dict[str, bytes]:
    """Return the small files of a checkpoint that are carried on, as its manifest lists them."""
    names = [
        name
        for name in read_manifest(directory)["files"]
        if name.startswith(("huggingface/", "tokenizer/"))
    ]
    return {name: (directory / name).read_bytes() for name in names if name != FORM}


def form_of(directory: Path) -> dict:
    """Return the prompt form in a checkpoint, the one file that training writes itself."""
    return json.loads((directory / FORM).read_bytes())


def expected(folder: Path) -> dict[str, bytes]:
    """Return what every checkpoint of a run of that folder carries."""
    return {
        **FILES,
        "tokenizer/tokenizer.model": (folder / "data" / "train_tokenizer.model").read_bytes(),
    }


def test_a_run_starts_from_weights_and_resumes_from_its_own_checkpoints(folder):
    lines = pretrain(
        1,
        folder,
        *RUN,
        "--load",
        "imported",
        "--save",
        "imported",
        "--save-interval",
        2,
        "--save-retain",
        1,
    )
    assert f"loaded imported/iter_0000000: {STARTED}" in lines
    assert [line["step"] for line in read_json_lines(folder / "imported" / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
    ]
    # --save-retain removed the checkpoint of step 2, but not the import
    assert sorted(path.name for path in (folder / "imported").glob("iter_*")) == [
        "iter_0000000",
        "iter_0000004",
    ]
    own = folder / "imported" / "iter_0000004"
    assert carried(own) == expected(folder) and "contents" not in read_manifest(own)
    assert form_of(own) == json.loads((folder / "data" / "train.json").read_text())["prompt_form"]
    # the same command again, two times: it resumes from its own checkpoints, and the carried files
    # are still there after the import was removed
    lines = pretrain(
        1, folder, *RUN, "--load", "imported", "--save", "./imported/", "--train-iters", 6
    )
    assert any(
        line.startswith("loaded imported/iter_0000004: step 4, 16 samples consumed")
        for line in lines
    )
    assert not any(line.startswith("passed over") for line in lines)
    shutil.rmtree(folder / "imported" / "iter_0000000")
    pretrain(1, folder, *RUN, "--load", "imported", "--save", "elsewhere", "--train-iters", 8)
    assert carried(folder / "elsewhere" / "iter_0000008") == expected(folder)
    run_ids = {
        read_manifest(folder / place)["run_id"]
        for place in ("imported/iter_0000006", "elsewhere/iter_0000008")
    }
    assert run_ids == {json.loads((folder / "imported" / "run.json").read_text())["run_id"]}


def test_pretrained_weights_and_restarts_of_the_same_command(folder):
    arguments = (*RUN, "--pretrained-checkpoint", "imported", "--load", "own", "--save", "own")
    lines = pretrain(1, folder, *arguments, "--exit-interval", 2)
    assert "loaded imported/iter_0000000: weights only, starting at step 0" in lines
    lines = pretrain(1, folder, *arguments)
    assert any(line.startswith("loaded own/iter_0000002: step 2") for line in lines)
    assert carried(folder / "own" / "iter_0000004") == expected(folder)


def test_optimizer_data_and_precision_may_differ(folder):
    """A training checkpoint would be refused for each of these changes."""
    lines = pretrain(
        1,
        folder,
        *RUN,
        "--load",
        "imported",
        "--optimizer",
        "sgd",
        "--bf16",
        "--global-batch-size",
        2,
        "--train-iters",
        1,
    )
    assert f"loaded imported/iter_0000000: {STARTED}" in lines
    lines = pretrain(
        2, folder, *RUN, "--load", "imported", "--tensor-model-parallel-size", 2, "--train-iters", 1
    )
    assert f"loaded imported/iter_0000000: {STARTED}" in lines
    with pytest.raises(
        AssertionError, match=r"--rotary-base: 10000 in the checkpoint, 500000 in this run"
    ):
        pretrain(1, folder, *RUN, "--load", "imported", "--rotary-base", 500000)


def test_weights_alone_evaluate_like_their_checkpoint(folder, trained):
    evaluate = (
        "--config",
        "run.yaml",
        "--pipeline-model-parallel-size",
        1,
        "--skip-train",
        "--load",
    )
    alone, whole = (
        pretrain(1, folder, *evaluate, place) for place in ("imported", trained[0] / "whole")
    )
    assert "loaded imported/iter_0000000: weights only (it holds nothing else)" in alone
    rows = [[line for line in lines if line.startswith("   ")] for lines in (alone, whole)]
    assert len(rows[0]) == 2 * 5 and rows[0] == rows[1]
