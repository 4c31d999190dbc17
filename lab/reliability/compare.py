"""Comparison of two runs, bit for bit."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sorted.monitoring.json_lines import read_json_lines

# Keys of a report that depend on a clock or the machine.
CLOCK = {
    *("time", "step_seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu", "phases"),
    *("tflops_per_device", "seconds_left", "seconds", "memory_bytes"),
}


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a torch_dist checkpoint by its global name, read by torch alone."""
    described = FileSystemReader(str(directory)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in described.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    load(tensors, storage_reader=FileSystemReader(str(directory)), no_dist=True)
    return tensors


def differing_tensors(one: Path, other: Path, step: int) -> tuple[int, list[str]]:
    """Return the number of tensors at ``step``, and a line for each difference."""
    ours, theirs = (read_tensors(root / f"iter_{step:07d}") for root in (one, other))
    different = [f"{name}: only in one checkpoint" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        if not torch.equal(ours[name], theirs[name]):
            different.append(
                f"{name}: by up to {(ours[name].double() - theirs[name].double()).abs().max():.3g}"
            )
    return len(ours), different


def without_clock(line: dict[str, Any]) -> dict[str, Any]:
    """Return a report without what depends on a clock."""
    return {key: value for key, value in line.items() if key not in CLOCK}


def differing_reports(one: Path, other: Path, steps: int) -> tuple[int, list[str]]:
    """Return the number of training reports of the ``other`` run, and a line for each difference.

    Each is compared with the report of the same step by ``one``. Steps that were repeated after a
    kill are compared each time.
    """
    expected = {
        line["step"]: without_clock(line)
        for line in read_json_lines(one)
        if line["kind"] == "train"
    }
    different = [
        f"step {step}: not reported" for step in range(1, steps + 1) if step not in expected
    ]
    lines = [without_clock(line) for line in read_json_lines(other) if line["kind"] == "train"]
    missing = set(expected) - {line["step"] for line in lines}
    different += [f"step {step}: not reported by the killed run" for step in sorted(missing)]
    for line in lines:
        if line != expected.get(line["step"]):
            keys = [key for key in line if line[key] != expected.get(line["step"], {}).get(key)]
            different.append(f"step {line['step']}: {', '.join(keys)}")
    assert all(math.isfinite(exit_["loss"]) for line in lines for exit_ in line["exits"].values())
    return len(lines), different
