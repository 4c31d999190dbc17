"""A small prepared data set and one finished run, shared by the tests of the command line."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import run_command

ROOT = Path(__file__).resolve().parents[2]
RUN = """\
num-layers: 4
hidden-size: 32
num-attention-heads: 4
seq-length: 64
exit-layer-nums: [1, 2, 3]
device: cpu
micro-batch-size: 2
global-batch-size: 4
data-path: [data/train_text_document]
valid-data-path: [data/first_text_document, data/second_text_document]
tokenizer-model: data/train_tokenizer.model
lr: 1e-2
lr-decay-iters: 6
train-iters: 4
log-interval: 1
eval-interval: 2
pipeline-model-parallel-size: 2
"""


def write_questions(path: Path, first: int, last: int) -> None:
    """Write samples ``first``..``last`` - 1 as JSON lines."""
    samples = (
        {
            "instruction": f"Add {i % 17} and {i % 11}",
            "input": "",
            "output": f"The sum is {i % 17 + i % 11}.",
        }
        for i in range(first, last)
    )
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Return a folder with prepared data, two evaluation sets, a tokenizer and ``run.yaml``."""
    folder = tmp_path_factory.mktemp("system")
    for name, first, last in (("train", 0, 200), ("first", 1000, 1024), ("second", 2000, 2016)):
        write_questions(folder / f"{name}.jsonl", first, last)
        tokenizer = (
            ["--train-tokenizer", 300]
            if name == "train"
            else ["--tokenizer-model", "data/train_tokenizer.model"]
        )
        done = run_command(
            "tools/prepare_data.py",
            "--input",
            f"{name}.jsonl",
            "--output-prefix",
            f"data/{name}",
            "--seq-length",
            64,
            *tokenizer,
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
    (folder / "run.yaml").write_text(RUN)
    return folder


@pytest.fixture(scope="session")
def trained(prepared) -> tuple[Path, subprocess.CompletedProcess]:
    """Return the folder and the finished torchrun of 4 steps on 2 processes, saved in ``whole``."""
    done = run_command(
        "pretrain_sorted.py",
        "--config",
        "run.yaml",
        "--save",
        "whole",
        "--save-interval",
        2,
        processes=2,
        cwd=prepared,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return prepared, done
