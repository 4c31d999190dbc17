"""Resuming from a checkpoint that is damaged, locked, or of a run with other settings."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sorted.checkpoint.manifest import MANIFEST
from megatron_sorted.monitoring.json_lines import read_json_lines
from tests.support.command_line import pretrain
from tests.support.commands import ROOT, run_command
from tests.system.test_pretrain import untimed

RUN = ("--config", "run.yaml", "--eval-interval", "none", "--valid-data-path", "--split", "100,0")


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """Return a folder with data, settings and the checkpoints of steps 2 and 4 in ``save``."""
    source, _ = trained
    shutil.copytree(source / "data", tmp_path / "data")
    shutil.copy(source / "run.yaml", tmp_path)
    assert not pretrain(
        1,
        tmp_path,
        *RUN,
        "--pipeline-model-parallel-size",
        1,
        "--save",
        "save",
        "--save-interval",
        2,
    )[-1].startswith("w")
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "truncated shard": (
        lambda d: (d / "__0_0.distcp").write_bytes((d / "__0_0.distcp").read_bytes()[:-9]),
        "__0_0.distcp: {} bytes where the manifest says {}; it is truncated",
    ),
    "flipped bit": (lambda d: flip(d / "__0_0.distcp"), "__0_0.distcp: damaged (sha256 "),
    "missing file": (lambda d: (d / "common.pt").unlink(), "common.pt: No such file or directory"),
    "damaged description": (lambda d: flip(d / ".metadata"), ".metadata: damaged (sha256 "),
    "newer format": (
        lambda d: (d / MANIFEST).write_text(
            (d / MANIFEST).read_text().replace('"format": 2', '"format": 3')
        ),
        "manifest.json: format 3, but this version reads format 2. A newer megatron_sorted wrote "
        "it: update",
    ),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), ": manifest.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported_and_the_previous_checkpoint_is_taken(folder, kind):
    spoil, message = DAMAGE[kind]
    newest = folder / "save" / "iter_0000004"
    size = (newest / "__0_0.distcp").stat().st_size
    spoil(newest)
    lines = pretrain(
        1,
        folder,
        *RUN,
        "--pipeline-model-parallel-size",
        1,
        "--load",
        "save",
        "--metrics-file",
        "again.jsonl",
    )
    (passed_over,) = [line for line in lines if line.startswith("passed over ")]
    assert (
        passed_over.startswith("passed over save/iter_0000004")
        and message.format(size - 9, size) in passed_over
    )
    assert any(
        line.startswith("loaded save/iter_0000002: step 2, 8 samples consumed, ") for line in lines
    )
    whole, again = (
        read_json_lines(folder / name) for name in ("save/metrics.jsonl", "again.jsonl")
    )
    assert [untimed(line) for line in again] == [
        untimed(line) for line in whole if line["step"] > 2
    ]


def test_without_an_undamaged_checkpoint_a_run_fails_and_does_not_start_afresh(folder):
    flip(folder / "save" / "iter_0000004" / "__0_0.distcp")
    flip(folder / "save" / "iter_0000002" / "__0_0.distcp")
    with pytest.raises(AssertionError) as error:
        pretrain(
            1,
            folder,
            *RUN,
            "--pipeline-model-parallel-size",
            1,
            "--load",
            "save",
            "--save",
            "save",
            "--train-iters",
            6,
        )
    message = str(error.value).splitlines()[-1]
    assert message.startswith(
        "megatron_sorted.errors.CheckpointError: --load: save holds no sound checkpoint: "
        "save/iter_0000004/__0_0."
    )
    assert "save/iter_0000002/__0_0.distcp: damaged" in message and message.endswith(
        "Restore one, or give another directory."
    )


def test_without_verification_the_hash_of_shards_is_not_read(folder):
    manifest = folder / "save" / "iter_0000004" / MANIFEST
    content = json.loads(manifest.read_text())
    content["files"]["__0_0.distcp"]["sha256"] = "0" * 64  # of a shard that can be loaded
    del content["sha256"]
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(content))
    lines = pretrain(
        1,
        folder,
        *RUN,
        "--pipeline-model-parallel-size",
        1,
        "--load",
        "save",
        "--no-verify-checkpoint",
        "--train-iters",
        5,
    )
    assert any(line.startswith("loaded save/iter_0000004: step 4") for line in lines)


def test_a_step_of_choice(folder):
    lines = pretrain(
        1,
        folder,
        *RUN,
        "--pipeline-model-parallel-size",
        1,
        "--load",
        "save",
        "--ckpt-step",
        2,
        "--train-iters",
        3,
    )
    assert any(line.startswith("loaded save/iter_0000002: step 2") for line in lines)


def test_changed_data_is_refused_unless_allowed(folder):
    one_process = (*RUN, "--pipeline-model-parallel-size", 1, "--load", "save", "--train-iters", 5)
    tokens = np.memmap(folder / "data" / "train_text_document.bin", np.uint16, "r+")
    tokens[100] = 5 + (tokens[100] == 5)
    tokens.flush()
    done = run_command("pretrain_sorted.py", *one_process, cwd=folder)
    assert done.returncode == 1 and done.stderr.startswith(
        "error: save/iter_0000004: trained on other data than this run names: "
        "train_text_document.bin"
    )
    assert done.stderr.endswith(
        "Sample 16 would not be the next one. Give the data back, continue with "
        "--allow-changed-data, or start at "
        "step 0 with --finetune.\n"
    )
    lines = pretrain(1, folder, *one_process, "--allow-changed-data")
    assert any(
        line.startswith("loaded save/iter_0000004") and "other data allowed" in line
        for line in lines
    )
    lines = pretrain(1, folder, *one_process, "--finetune")
    assert "loaded save/iter_0000004: weights only, starting at step 0" in lines
    with pytest.raises(AssertionError, match=r"seed 1234 -> 7"):
        pretrain(1, folder, *one_process, "--seed", 7)


def test_another_tokenizer_is_refused(folder):
    manifest = folder / "save" / "iter_0000004" / MANIFEST
    content = json.loads(manifest.read_text())
    assert content["tokenizer"]["name"] == "train_tokenizer.model"
    samples = (
        {"instruction": f"Subtract {i:x} from {i * 7919:b}", "output": oct(i)} for i in range(300)
    )
    (folder / "more.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    done = run_command(
        "tools/prepare_data.py",
        "--input",
        "more.jsonl",
        "--output-prefix",
        "data/more",
        "--seq-length",
        64,
        "--train-tokenizer",
        300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    done = run_command(
        "pretrain_sorted.py",
        *RUN,
        "--pipeline-model-parallel-size",
        1,
        "--load",
        "save",
        "--data-path",
        "data/more_text_document",
        "--tokenizer-model",
        "data/more_tokenizer.model",
        "--finetune",
        cwd=folder,
    )
    assert done.stderr.startswith("error: --tokenizer-model: more_tokenizer.model (sha256 ")
    assert (
        "was made with train_tokenizer.model" in done.stderr
        and "save/iter_0000004/tokenizer" in done.stderr
    )


def test_changed_length_batch_and_layout_are_reported_and_resumed_correctly(folder):
    whole = read_json_lines(folder / "save" / "metrics.jsonl")
    lines = pretrain(
        2,
        folder,
        *RUN,
        "--load",
        "save",
        "--ckpt-step",
        2,
        "--train-iters",
        5,
        "--global-batch-size",
        8,
        "--micro-batch-size",
        1,
        "--metrics-file",
        "changed.jsonl",
    )
    (loaded,) = [line for line in lines if line.startswith("loaded ")]
    assert loaded == (
        "loaded save/iter_0000002: step 2, 8 samples consumed, learning rate 7.500e-03; changed: "
        "pipeline-model-parallel-size 1 -> 2; micro-batch-size 2 -> 1; global-batch-size 4 -> 8; "
        "train-iters 4 -> 5"
    )
    changed = read_json_lines(folder / "changed.jsonl")
    assert [line["samples"] for line in changed] == [16, 24, 32]
    # the learning rate follows steps, whatever their batch size; and one step of 8 sees the samples
    # that two of 4 saw
    assert [line["learning_rate"] for line in changed[:2]] == [
        line["learning_rate"] for line in whole[2:4]
    ]
    assert changed[0]["data_checksum"] == sum(line["data_checksum"] for line in whole[2:4]) % 2**32


def test_the_second_of_two_jobs_is_refused(folder):
    held = """
import sys, time
from megatron_sorted.checkpoint.lock import DirectoryLock
lock = DirectoryLock("save")
assert lock.acquire()
print("held", flush=True)
time.sleep(100)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", held], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        before = sorted(path.name for path in (folder / "save").iterdir())
        with pytest.raises(
            AssertionError,
            match=r"--save: another run is saving into save \(.*\"process\": " + str(holder.pid),
        ):
            pretrain(2, folder, *RUN, "--load", "save", "--save", "save", "--train-iters", 6)
        assert sorted(path.name for path in (folder / "save").iterdir()) == before
    finally:
        holder.kill()
        holder.wait()


def test_a_run_resumes_if_the_tracker_does_not_name_its_first_checkpoint_yet(folder):
    """Killed between the rename of the first checkpoint and the tracker."""
    (folder / "save" / "latest_checkpointed_iteration.txt").unlink()
    lines = pretrain(
        1, folder, *RUN, "--pipeline-model-parallel-size", 1, "--load", "save", "--train-iters", 5
    )
    assert any(line.startswith("loaded save/iter_0000004: step 4") for line in lines)


def test_damaged_small_files_are_detected_even_if_shards_are_not_read(folder):
    flip(folder / "save" / "iter_0000004" / ".metadata")
    lines = pretrain(
        1,
        folder,
        *RUN,
        "--pipeline-model-parallel-size",
        1,
        "--load",
        "save",
        "--train-iters",
        5,
        "--no-verify-checkpoint",
    )
    assert any(
        line.startswith("passed over save/iter_0000004/.metadata: damaged (sha256 ")
        for line in lines
    )
    assert any(line.startswith("loaded save/iter_0000002: step 2") for line in lines)
