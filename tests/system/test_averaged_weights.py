"""Averaged weights of a whole run: reports, checkpoints, resume and export, against plain torch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sorted.monitoring.json_lines import read_json_lines
from tests.support.commands import run_command

RUN = (
    *("--mock-data", "--vocab-size", 64, "--num-layers", 3, "--exit-layer-nums", 1, 2),
    *("--hidden-size", 32, "--ffn-hidden-size", 48, "--num-attention-heads", 2),
    *("--seq-length", 16, "--micro-batch-size", 2, "--lr", 1e-2, "--lr-decay-style", "constant"),
    *("--train-iters", 6, "--eval-iters", 1, "--device", "cpu", "--use-exit-norm"),
    *("--average-weights-from", 0.4, "--average-every", 2, "--evaluate-averaged"),
)
AVERAGED = (4, 6)  # 0.4 x 6 is step 2


STOPPED_EARLY = 75


def done(script: str, *arguments: object, cwd: Path, processes: int = 0, code: int = 0) -> str:
    """Return what a command prints; it must end with ``code``."""
    ended = run_command(script, *arguments, cwd=cwd, processes=processes)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout


def refused(script: str, *arguments: object, cwd: Path) -> str:
    """Return the error of a command, which must fail with one line."""
    ended = run_command(script, *arguments, cwd=cwd)
    assert ended.returncode != 0 and "Traceback" not in ended.stderr, ended.stdout + ended.stderr
    return ended.stderr + ended.stdout


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a Hugging Face directory."""
    return {
        name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a run that stopped at step 5 and resumed as two stages, and exports."""
    place = tmp_path_factory.mktemp("averaged")
    saving = ("--save", "run", "--save-interval", 1, "--metrics-file", "run/metrics.jsonl")
    done("pretrain_sorted.py", *RUN, *saving, "--exit-interval", 5, cwd=place, code=STOPPED_EARLY)
    stages = ("--pipeline-model-parallel-size", 2, "--pipeline-model-parallel-layout", "Et|ttL")
    export = ("--save-hf", "hf", "--save-hf-weights", "both", "--load", "run")
    done("pretrain_sorted.py", *RUN, *saving, *stages, *export, cwd=place, processes=2)
    return place


def test_exported_averages_are_the_mean_of_the_exported_steps(folder):
    for step in AVERAGED:
        done(
            *("tools/convert.py", "export", "run", f"step{step}", "--ckpt-step", step),
            "--no-verify",
            cwd=folder,
        )
    steps, averaged = (
        [tensors(folder / f"step{step}") for step in AVERAGED],
        tensors(folder / "hf" / "averaged"),
    )
    assert averaged.keys() == steps[0].keys() and len(averaged) > 20
    for name, tensor in averaged.items():
        mean = torch.stack([one[name].double() for one in steps]).mean(0)
        assert ((tensor.double() - mean).norm() / mean.norm()).item() < 1e-6, name
    last = tensors(folder / "hf" / "last")
    assert all(torch.equal(last[name], steps[1][name]) for name in last)
    exported = json.loads((folder / "hf" / "averaged" / "export.json").read_text())
    assert exported["weights"] == "averaged" and exported["step"] == 6


def test_a_checkpoint_is_exported_and_verified_with_either_weights(folder):
    shown = done(*("tools/convert.py", "export", "run", "both", "--weights", "both"), cwd=folder)
    assert shown.count(", verified") == 2
    for kind in ("last", "averaged"):
        before, now = tensors(folder / "hf" / kind), tensors(folder / "both" / kind)
        assert all(torch.equal(before[name], now[name]) for name in before), kind
    verify = ("tools/convert.py", "verify", "run", "both/averaged")
    assert "the same model" in done(*verify, "--weights", "averaged", cwd=folder)
    assert "not the same model" in refused(*verify, cwd=folder)


def test_both_losses_of_every_exit_are_reported_and_are_those_of_a_later_evaluation(folder):
    [line] = [
        line
        for line in read_json_lines(folder / "run" / "metrics.jsonl")
        if line["kind"] == "evaluation"
    ]
    assert line["step"] == 6 and set(line["averaged"]) == set(line["exits"]) == {"1", "2", "3"}
    result = json.loads((folder / "run" / "evaluation.json").read_text())
    later = done(
        *("pretrain_sorted.py", *RUN[:-5], "--evaluate-averaged", "--skip-train", "--load", "run"),
        *("--metrics-file", "later.jsonl"),
        cwd=folder,
    )
    assert "averaged: loss" in later
    [again] = read_json_lines(folder / "later.jsonl")
    for depth in line["exits"]:
        for kind, record in (("exits", result["sets"]), ("averaged", result["averaged"])):
            loss = line[kind][depth]["loss"]
            assert record["mock"][depth]["loss"] == loss
            assert again[kind][depth]["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["averaged"][depth]["loss"] != line["exits"][depth]["loss"]


def test_bad_input_names_value_rule_and_remedy(folder):
    other = [0.5 if word == 0.4 else word for word in RUN]
    error = refused("pretrain_sorted.py", *other, "--load", "run", "--save", "run", cwd=folder)
    assert "which this run would not continue" in error
    assert "--average-weights-from 0.3 --average-every 2" in error
    error = refused(
        *("tools/convert.py", "export", "run", "x", "--ckpt-step", 3, "--weights", "averaged"),
        cwd=folder,
    )
    assert "--weights: averaged, but " in error and "holds no averaged weights" in error
    error = refused(
        *("pretrain_sorted.py", *RUN[:-5], "--evaluate-averaged", "--skip-train", "--load", "run"),
        *("--ckpt-step", 3),
        cwd=folder,
    )
    assert "--evaluate-averaged: " in error and "holds no averaged weights" in error
    assert not (folder / "x").exists()
