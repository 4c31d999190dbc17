"""Each command in a new process without earlier imports; other tests fork a preloaded process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT, command_line, environment, run_command
from tests.support.evaluated import TEXTS, write_model
from tests.support.ports import free_port, until_it_answers

COMMANDS = [
    "pretrain_sorted.py",
    *sorted(f"tools/{path.name}" for path in ROOT.glob("tools/*.py") if path.stem != "entry"),
]
IMPORTS_OF_TORCH = 6
"""Largest CPU time to refuse a wrong option, over that of ``import torch``; 3 is reached now."""


def ended(command: list[str], folder: Path) -> tuple[int, str, float]:
    """Return exit status, error output and CPU seconds of a program that ends by itself."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        output = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, output, used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def torch_seconds(tmp_path_factory) -> float:
    """Return the CPU seconds of importing torch here and now."""
    return ended([sys.executable, "-c", "import torch"], tmp_path_factory.mktemp("torch"))[2]


@pytest.mark.parametrize("script", COMMANDS)
def test_a_wrong_option_is_refused_before_long(script, tmp_path, torch_seconds):
    status, output, used = ended(command_line(script, "--no-such-option", "1", cold=True), tmp_path)
    assert status in (1, 2) and "error: " in output and "Traceback" not in output, output
    assert used < IMPORTS_OF_TORCH * torch_seconds, (
        f"{used:.1f} CPU seconds, import torch {torch_seconds:.1f}"
    )


@pytest.fixture(scope="module")
def life(tmp_path_factory) -> Path:
    """Return a folder with prepared texts, a run of two steps, a nested model and test texts."""
    folder = tmp_path_factory.mktemp("life")
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 8)
    )
    write_model(folder / "model", seed=1, num_layers=4, max_position_embeddings=128)
    (folder / "valid.txt").write_text("\n".join(TEXTS))
    (folder / "questions.jsonl").write_text(
        '{"question_id": 1, "category": "writing", "turns": ["a b c"]}\n'
    )
    for script, *arguments in (
        (
            "tools/prepare_data.py",
            "--input",
            "train.jsonl",
            "--output-prefix",
            "data",
            "--train-tokenizer",
            290,
        ),
        (
            "pretrain_sorted.py",
            *TRAINING,
            "--use-distributed-optimizer",
            "--save",
            "run",
            "--save-interval",
            2,
        ),
    ):
        done = run_command(script, *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


WARNED = re.compile(r"Warning\b|deprecated|not provided|^WARNING", re.MULTILINE)
"""Words of warnings of Python's and of libraries' loggers."""
TRAINING = (
    "--config",
    ROOT / "examples" / "quickstart.yaml",
    "--no-mock-data",
    "--data-path",
    "data_text_document",
    "--tokenizer-type",
    "SentencePieceTokenizer",
    "--tokenizer-model",
    "data_tokenizer.model",
    "--train-iters",
    2,
    "--log-interval",
    1,
    "--eval-interval",
    "none",
)
FEW = ("--questions", "questions.jsonl", "--max-new-tokens", 4)
USES = {
    "prepare": (
        "tools/prepare_data.py",
        ("--input", "train.jsonl", "--output-prefix", "cold", "--train-tokenizer", 290),
        "trained tokens",
    ),
    "split": (
        "tools/split_text.py",
        ("--input", "train.jsonl", "--output", "split", "--num-held-out", 1, "--num-tuning", 1),
        "",
    ),
    "train": (
        "pretrain_sorted.py",
        (*TRAINING, "--use-distributed-optimizer", "--save", "cold"),
        "step 2",
    ),
    "resume": (
        "pretrain_sorted.py",
        (*TRAINING, "--use-distributed-optimizer", "--load", "run", "--train-iters", 3),
        "step 3",
    ),
    "plan": ("tools/plan.py", (ROOT / "examples" / "quickstart.yaml",), "memory of one rank"),
    "report": ("tools/report.py", ("run",), ""),
    "export": ("tools/convert.py", ("export", "run", "cold_hf"), "verified"),
    "extract": ("tools/extract_submodel.py", ("model", "cold_sub", "--depth", 2), ""),
    "evaluate": ("tools/evaluate.py", ("model", "--text", "valid.txt"), "nats"),
    "generate": (
        "tools/generate.py",
        ("model", "--depths", 1, 2, "--prompt", "a b", "--max-new-tokens", 4),
        "",
    ),
    "tune": ("tools/tune_decoding.py", ("model", "--depths", 1, 2, *FEW, "--num-prompts", 1), ""),
    "benchmark": (
        "tools/benchmark_decoding.py",
        ("model", "--depths", 1, 2, *FEW, "--per-group", 1, "--output", "cold_bench"),
        "",
    ),
}


@pytest.mark.parametrize("use", USES)
def test_a_command_works_with_its_own_imports(use, life):
    script, arguments, output = USES[use]
    done = run_command(script, *arguments, cwd=life, cold=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert output in done.stdout + done.stderr, done.stdout + done.stderr
    assert not WARNED.search(done.stdout + done.stderr), done.stdout + done.stderr


def test_a_server_works_with_its_own_imports(life):
    port = free_port()
    command = command_line("tools/serve.py", "model", "--depths", 1, 2, "--port", port, cold=True)
    with subprocess.Popen(
        command, cwd=life, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:
        try:
            assert until_it_answers(server, port, "/v1/models")["data"]
            server.terminate()
            assert server.wait(60) in (0, 143, -15)
            printed = server.stdout.read().decode()
            assert not WARNED.search(printed), printed
        finally:
            server.kill()
