"""A checkpoint of weights only, like an import's, written by stripping a training checkpoint."""

import json
import pickle
import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sorted.checkpoint.layout import TRACKER, iteration_directory
from megatron_sorted.checkpoint.manifest import (
    MANIFEST,
    WEIGHTS_ONLY,
    Progress,
    manifest_text,
    read_manifest,
    record_file,
)


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a checkpoint's model, by name."""
    stored = pickle.loads(
        (directory / ".metadata").read_bytes()
    ).state_dict_metadata  # written by the test itself
    weights = {
        name: torch.empty(what.size, dtype=what.properties.dtype)
        for name, what in stored.items()
        if isinstance(what, TensorStorageMetadata) and not name.startswith("optimizer")
    }
    dcp.load(weights, checkpoint_id=str(directory), no_dist=True)
    return weights


def weights_by_layer(directory: Path) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a checkpoint's model, with the layer's index in the name.

    A file stacks those of all layers.
    """
    tensors = {}
    for name, tensor in read_weights(directory).items():
        inner = name.removeprefix("decoder.layers.")
        tensors |= (
            {name: tensor}
            if inner == name
            else {f"decoder.layers.{i}.{inner}": part for i, part in enumerate(tensor)}
        )
    return tensors


def strip_to_weights(
    directory: Path,
    root: Path,
    dtype: torch.dtype | None = None,
    more_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint of step 0 under ``root`` with the weights of another, and return it.

    Args:
        directory: The training checkpoint.
        root: Directory of all checkpoints for the new one.
        dtype: The dtype of the stored weights; None to keep it.
        more_files: Further small files by name; the tokenizer's are copied from the training
            checkpoint.
    """
    manifest, target = read_manifest(directory), iteration_directory(root, 0)
    weights = {
        name: tensor.to(dtype or tensor.dtype) for name, tensor in read_weights(directory).items()
    }
    dcp.save(weights, checkpoint_id=str(target), no_dist=True)
    torch.save({}, target / "common.pt")
    (target / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    if (directory / "tokenizer").is_dir():
        shutil.copytree(directory / "tokenizer", target / "tokenizer")
    for name, content in (more_files or {}).items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)
    files = {
        str(path.relative_to(target)): record_file(path)
        for path in sorted(target.rglob("*"))
        if path.is_file()
    }
    described = {
        "run_id": "imported",
        "contents": WEIGHTS_ONLY,
        "saved_at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "shape": manifest["shape"],
        "tokenizer": manifest["tokenizer"],
    }
    (target / MANIFEST).write_text(manifest_text(described, Progress(0, 0), files))
    (root / TRACKER).write_text("0")
    return target
