"""Checkpoints of each megatron-core continued under each other, in the same and another layout."""

import hashlib
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from lab.reliability.compare import read_tensors
from lab.versions.records import Records
from lab.versions.training import Run, train

# Dropout, drawn exits and moments of Adam: a checkpoint that loses random state, a step or a
# moment shows in the weights.
NETWORK = [
    *("--mock-data", "--vocab-size", "512", "--num-layers", "4", "--hidden-size", "64"),
    *("--num-attention-heads", "4", "--exit-layer-nums", "1", "2", "3", "--seq-length", "32"),
    *("--exit-sampling", "uniform", "--num-sampled-exits", "2", "--hidden-dropout", "0.1"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "1e-3", "--device", "cpu"),
    *("--lr-decay-style", "constant", "--seed", "5", "--log-interval", "1"),
    *("--eval-interval", "none"),
]
SAVED_AT, STEPS = 3, 6
SAVED = ("tp 2, sequence parallel, dp 2, distributed optimizer", 4, (
    *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    *("--use-distributed-optimizer", "--overlap-grad-reduce"),
))  # fmt: skip
OTHER = ("pp 2, distributed optimizer", 2, (
    *("--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"),
))  # fmt: skip
LAYOUTS = {"same": SAVED, "other": OTHER}
"""How a run continues: description, number of processes and flags."""


def digest(directory: Path) -> tuple[str, int]:
    """Return a hash of every tensor in a checkpoint, and their number: weights and moments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one process reads, as it should
        whole, tensors = hashlib.sha256(), read_tensors(directory)
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        whole.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16], len(tensors)


def run_of(name: str, folder: Path, layout: str, *flags: str) -> Run:
    """Return the run that saves into ``folder``/NAME."""
    _, processes, layout_flags = LAYOUTS[layout]
    save = ("--train-iters", str(STEPS), "--save", str(folder / name), "--no-async-save")
    return Run(name, processes, (*NETWORK, *layout_flags, *save, *flags), str(folder))


def _train_and_digest(python: Path, runs: Sequence[Run], folder: Path, records: Records) -> None:
    """Do those runs that no record tells of, and record the hash of what each saved last."""
    missing = [run for run in runs if records.get(f"checkpoints/{run.name}") is None]
    for run in missing:
        shutil.rmtree(folder / run.name, ignore_errors=True)
    if missing:
        train(python, missing)
    for run in missing:
        hashed, number = digest(folder / run.name / f"iter_{STEPS:07d}")
        records.put(f"checkpoints/{run.name}", {"hash": hashed, "tensors": number})
        if "under" in run.name:
            shutil.rmtree(folder / run.name)


def run_checkpoints(pythons: dict[str, Path], folder: Path, records: Records) -> dict:
    """Return the hashes of all runs by name, and whether each pair of versions is as it should be.

    Every version trains without interruption, which also saves the middle; then every version
    continues every middle in both layouts. In the same layout the end must be that of the
    uninterrupted run; in the other one that of the change of layout without a change of version.
    """
    folder = folder.absolute() / "checkpoints"
    for version, python in pythons.items():
        print(f"checkpoints: {version} trains without interruption", flush=True)
        whole = run_of(version, folder, "same", "--save-interval", str(SAVED_AT))
        if not (folder / version / f"iter_{SAVED_AT:07d}").is_dir():
            records.forget(f"checkpoints/{version}")
        _train_and_digest(python, [whole], folder, records)
    for version, python in pythons.items():
        print(f"checkpoints: {version} continues those of all", flush=True)
        continued = [
            run_of(
                f"{saved} under {version}, {layout}",
                folder,
                layout,
                *("--load", str(folder / saved), "--ckpt-step", str(SAVED_AT)),
            )
            for saved in pythons
            for layout in LAYOUTS
        ]
        _train_and_digest(python, continued, folder, records)
    hashes = {
        name: records.get(f"checkpoints/{name}")
        for name in (
            *pythons,
            *(f"{a} under {b}, {layout}" for a in pythons for b in pythons for layout in LAYOUTS),
        )
    }
    return {"hashes": hashes, "pairs": judge_pairs(list(pythons), hashes)}


def judge_pairs(versions: Sequence[str], hashes: dict) -> list[dict]:
    """Return, for each pair of versions and each layout, whether the end is the expected one."""
    return [
        {
            "saved by": saved,
            "continued by": version,
            "layout": layout,
            "equal": hashes[f"{saved} under {version}, {layout}"]
            == hashes[saved if layout == "same" else f"{saved} under {saved}, other"],
        }
        for saved in versions
        for version in versions
        for layout in LAYOUTS
    ]
