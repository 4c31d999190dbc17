"""Runs from one Hugging Face directory to another, without any setting of the network."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from megatron_sorted.checkpoint.manifest import read_manifest
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.network import load_network
from megatron_sorted.monitoring.json_lines import read_json_lines
from tests.support.command_line import pretrain
from tests.support.commands import run_command
from tests.support.hugging_face import exit_logits
from tests.support.model_directories import save_model

CHAT = "{{ messages }}"
RUN = (
    "--seq-length",
    32,
    "--device",
    "cpu",
    "--micro-batch-size",
    2,
    "--global-batch-size",
    4,
    "--lr",
    1e-2,
    "--lr-decay-style",
    "constant",
    "--train-iters",
    2,
    "--log-interval",
    1,
    "--mock-data",
    "--adam-eps",
    1e-4,
)
TENSOR_AND_PIPELINE = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """Return a folder with directories ``qwen3`` (untied) and ``llama3`` (tied) of small files."""
    folder = tmp_path_factory.mktemp("hugging_face")
    save_model(folder / "qwen3", "qwen3")
    save_model(folder / "llama3", "llama3", tied=True)
    for name in ("qwen3", "llama3"):
        (folder / name / "generation_config.json").write_text('{"temperature": 0.7}')
        (folder / name / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture
def folder(origin, tmp_path) -> Path:
    """Return an empty folder in which the directories can be named."""
    for name in ("qwen3", "llama3"):
        (tmp_path / name).symlink_to(origin / name)
    return tmp_path


def losses_at_first_step(folder: Path, save: str) -> dict[int, float]:
    """Return {depth: loss} of a run's first step, before the weights changed."""
    first = next(iter(read_json_lines(folder / save / "metrics.jsonl")))
    return {int(depth): numbers["loss"] for depth, numbers in first["exits"].items()}


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_the_first_losses_are_the_same_in_every_layout_and_after_an_import(name, folder):
    arguments = (*RUN, "--exit-layer-nums", 1, 3)
    pretrain(1, folder, *arguments, "--load", name, "--save", "alone")
    lines = pretrain(
        4, folder, *arguments, *TENSOR_AND_PIPELINE, "--load", name, "--save", "spread"
    )
    assert f"loaded {name}: weights only (it holds nothing else), starting at step 0" in lines
    one, other = losses_at_first_step(folder, "alone"), losses_at_first_step(folder, "spread")
    assert one.keys() == {1, 3, 4} and one == pytest.approx(other, rel=1e-5)
    assert len(set(one.values())) == 3, "exits that say the same were not read apart"


def test_a_trained_model_is_exported_and_computes_what_its_checkpoint_does(folder):
    from transformers import AutoModelForCausalLM

    lines = pretrain(
        4,
        folder,
        *RUN,
        *TENSOR_AND_PIPELINE,
        "--load",
        "qwen3",
        "--exit-layer-nums",
        2,
        "--save",
        "run",
        "--save-hf",
        "out",
    )
    assert any(line.startswith("wrote out; verified: ") for line in lines)
    trained, before = (
        AutoModelForCausalLM.from_pretrained(folder / place, dtype=torch.float32)
        for place in ("out", "qwen3")
    )
    tokens = torch.arange(20)[None]
    logits, old = exit_logits(trained, tokens), exit_logits(before, tokens)
    assert all(float((logits[depth] - old[depth]).abs().max()) > 1e-2 for depth in (2, 4)), (
        "nothing was trained"
    )
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["exit_layer_indices"] == [2, 4] and config["model_type"] == "qwen3"
    assert json.loads((folder / "out" / "generation_config.json").read_text()) == {
        "temperature": 0.7
    }
    assert (folder / "out" / "chat_template.jinja").read_text() == CHAT
    # what went out comes in again: the same losses as going on from the checkpoint's weights
    pretrain(1, folder, *RUN, "--load", "out", "--save", "from_out")
    pretrain(
        1,
        folder,
        *RUN,
        "--load",
        "run",
        "--finetune",
        "--use-checkpoint-args",
        "--save",
        "from_run",
    )
    one, other = losses_at_first_step(folder, "from_out"), losses_at_first_step(folder, "from_run")
    assert one.keys() == {2, 4} and one == pytest.approx(other, rel=1e-6)


def test_a_restarted_job_resumes_from_its_own_checkpoints(folder):
    arguments = (
        *RUN,
        "--pretrained-checkpoint",
        "llama3",
        "--load",
        "own",
        "--save",
        "own",
        "--save-hf",
        "out",
    )
    lines = pretrain(1, folder, *arguments, "--exit-interval", 1)
    assert (
        "loaded llama3: weights only, starting at step 0" in lines and not (folder / "out").exists()
    )
    lines = pretrain(1, folder, *arguments)
    assert (
        any(line.startswith("loaded own/iter_0000001: step 1") for line in lines)
        and (folder / "out" / "config.json").exists()
    )
    # Once more, to train longer: its own export may be replaced, and small files are still there.
    pretrain(1, folder, *arguments, "--train-iters", 3)
    assert json.loads((folder / "out" / "export.json").read_text())["step"] == 3
    manifest = read_manifest(folder / "own" / "iter_0000003")
    assert {
        "huggingface/config.json",
        "huggingface/generation_config.json",
        "tokenizer/chat_template.jinja",
    } <= set(manifest["files"])


def test_the_same_command_again_resumes_from_its_checkpoints(folder):
    arguments = (*RUN, "--load", "llama3", "--exit-layer-nums", 1, "--save", "run")
    assert "loaded llama3: weights only (it holds nothing else), starting at step 0" in pretrain(
        1, folder, *arguments, "--exit-interval", 1
    )
    lines = pretrain(1, folder, *arguments)
    assert (
        "--save run holds checkpoints of this run up to step 1: resuming from them, not from llama3"
        in lines
    )
    assert any(line.startswith("loaded run/iter_0000001: step 1") for line in lines)
    first, second = (read_manifest(folder / "run" / f"iter_000000{step}") for step in (1, 2))
    assert first["run_id"] == second["run_id"] and first["start"] == second["start"]
    with pytest.raises(
        AssertionError, match=r"up to step 2 of another run: it started from the Hugging Face"
    ):
        pretrain(1, folder, *RUN, "--load", "qwen3", "--exit-layer-nums", 1, "--save", "run")


def test_new_norms_and_heads_begin_as_the_last_exits(folder):
    shared, own = (
        (*RUN, "--exit-layer-nums", 1, 3),
        ("--use-exit-norm", "--untie-exit-output-weights"),
    )
    pretrain(1, folder, *shared, "--load", "llama3", "--save", "shared")
    pretrain(
        2,
        folder,
        *shared,
        *own,
        "--load",
        "llama3",
        "--save",
        "own",
        "--pipeline-model-parallel-size",
        2,
        "--save-hf",
        "out",
    )
    assert losses_at_first_step(folder, "own") == pytest.approx(
        losses_at_first_step(folder, "shared"), rel=1e-5
    )
    assert (folder / "out" / "exits.safetensors").exists()
    # The model brings its exits' own norms and heads, so no option is needed for them.
    pretrain(1, folder, *RUN, "--load", "out", "--save", "again")
    assert losses_at_first_step(folder, "again").keys() == {1, 3, 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hidden-size", 64), r"--hidden-size: 32 in the checkpoint, 64 in this run"),
        (("--rotary-base", 7), r"--rotary-base: 500000 in the checkpoint, 7 in this run"),
        (("--exit-layer-nums", 9), r"--exit-layer-nums: 9 is not a layer of this model"),
        (("--save", "run", "--save-hf", "taken"), r"--save-hf: taken: exists and is not empty"),
        (("--save-hf", "out"), r"--save-hf: it exports the last checkpoint. Give --save as well"),
    ],
)
def test_contradictory_options_are_refused_before_anything_starts(arguments, message, folder):
    (folder / "taken").mkdir()
    (folder / "taken" / "mine").write_text("x")
    with pytest.raises(AssertionError, match=message):
        pretrain(1, folder, *RUN, "--load", "llama3", *arguments)


def test_a_network_no_family_has_is_refused_before_training(folder):
    with pytest.raises(
        AssertionError,
        match=r"--save-hf: --normalization: LayerNorm, which no supported Hugging Face family has",
    ):
        pretrain(
            1,
            folder,
            *RUN,
            "--vocab-size",
            100,
            "--num-layers",
            2,
            "--hidden-size",
            32,
            "--num-attention-heads",
            4,
            "--normalization",
            "LayerNorm",
            "--save",
            "run",
            "--save-hf",
            "out",
        )


def test_a_damaged_directory_is_refused(folder):
    shutil.copytree(folder / "llama3", folder / "half")
    (folder / "half" / "model.safetensors").write_bytes(
        (folder / "half" / "model.safetensors").read_bytes()[:-10]
    )
    with pytest.raises(AssertionError, match=r"too short: the download did not finish"):
        pretrain(1, folder, *RUN, "--load", "half")


def refused(folder: Path, *arguments: object) -> str:
    """Return the message of a run that is refused."""
    done = run_command("pretrain_sorted.py", *map(str, arguments), cwd=folder)
    assert done.returncode in (1, 2), done.stderr
    return done.stderr


LONGER = (
    *(*RUN, "--load", "origin", "--exit-layer-nums", 2, "--position-embedding-type", "yarn"),
    *("--yarn-rotary-scaling-factor", 4, "--yarn-original-max-position-embeddings", 8),
    "--rope-resonance",
)


def test_a_model_continues_with_yarn_and_resonance_and_is_exported_for_plain_transformers(tmp_path):
    """From a model without scaling, under tensor and pipeline parallelism, to a directory."""
    from transformers import AutoModelForCausalLM

    save_model(tmp_path / "origin", "llama", tied=True)
    lines = pretrain(
        4, tmp_path, *LONGER, *TENSOR_AND_PIPELINE, "--save", "run", "--save-hf", "out"
    )
    assert any(line.startswith("wrote out; verified: ") for line in lines)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = config.get("rope_parameters") or config["rope_scaling"]
    assert rope["rope_type"] == "longrope" and config["rope_resonance"]["rope_type"] == "yarn"
    assert rope["attention_factor"] == pytest.approx(0.1 * math.log(4) + 1)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = exit_logits(trained, torch.arange(32)[None])
    network = load_network(tmp_path / "out", native="off")
    for depth in (2, 4):
        state = DecodingState(network, 1, 32, (2, 4))
        state.append(torch.arange(32)[None])
        state.read(depth)
        got = state.logits(depth, state.last_slots())[0, 0]
        assert (got - expected[depth][0, -1]).abs().max() < 1e-5 * expected[depth].abs().max()
    # the exported model brings its scaling: the first losses are those of its checkpoint
    more = (*RUN, "--exit-layer-nums", 2)
    pretrain(1, tmp_path, *more, "--load", "out", "--save", "exported")
    pretrain(
        1, tmp_path, *more, "--load", "run", "--use-checkpoint-args", "--finetune", "--save", "same"
    )
    losses = [losses_at_first_step(tmp_path, name) for name in ("exported", "same")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_scaling_that_would_be_forgotten_or_cannot_be_exported_is_refused(tmp_path):
    save_model(tmp_path / "origin", "llama", tied=True)
    pretrain(1, tmp_path, *LONGER, "--save", "run")
    network = ("--num-layers", 4, "--hidden-size", 32, "--ffn-hidden-size", 48)
    network += ("--num-attention-heads", 4, "--vocab-size", 100, "--norm-epsilon", 1e-6)
    forgotten = (*RUN, *network, "--exit-layer-nums", 2, "--load", "run", "--finetune")
    failed = refused(tmp_path, *forgotten)
    assert "yarn x 4 from 8 tokens, attention x 1.1386, resonance in the checkpoint" in failed
    assert "default in this run" in failed
    dynamic = ("--rope-scaling-type", "dynamic", "--rope-scaling-factor", 4)
    dynamic += ("--rope-scaling-original-max-position-embeddings", 8, "--rope-resonance")
    failed = refused(tmp_path, *RUN, "--load", "origin", *dynamic, "--save", "x", "--save-hf", "y")
    assert "--save-hf: --rope-resonance: together with --rope-scaling-type dynamic" in failed
