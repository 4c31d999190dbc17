"""Files of a legacy checkpoint of Megatron-LM or MindSpeed, and what each holds of the model."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.conversion.megatron.names import LAYER, current_name, is_no_weight, plain_name
from megatron_sorted.conversion.megatron.saved_tensors import SavedFile, SavedTensor
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown

RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
FILES = ("model_optim_rng.pt", "model_rng.pt")
OLDEST_VERSION = 2.0
"""Checkpoints of earlier versions order queries, keys and values differently."""


@dataclass
class RankFile:
    """What one rank saved.

    Attributes:
        file: The file.
        chunks: The model chunks, each {megatron-core's name: location}; layers count from 0 in
            each.
        arguments: Megatron's arguments; None if the file has none.
        step: The iteration at which it was saved.
    """

    file: SavedFile
    chunks: list[dict[str, SavedTensor]]
    arguments: dict[str, Any] | None
    step: int


def rank_files(directory: Path) -> dict[tuple[int, int], Path]:
    """Return {(pipeline rank, tensor rank): file} of all ranks.

    Raises:
        CheckpointError: A file is missing, or there are files of expert parallel ranks.
    """
    files_by_rank: dict[tuple[int, int], Path] = {}
    for path in sorted(directory.iterdir()):
        match = RANK.fullmatch(path.name)
        files = [path / name for name in FILES if (path / name).is_file()] if match else []
        if not match or not (files or path.is_dir()):
            continue
        if match[3] is not None and files:
            raise CheckpointError(
                f"{path}: is of a model spread over expert parallel ranks; models with experts "
                "cannot be converted."
            )
        if match[3] is not None:
            continue  # a directory of the optimizer, as Megatron-LM of 2023 writes
        if not files:
            raise CheckpointError(f"{path / FILES[0]}: is missing. Copy the whole directory again.")
        place = (int(match[2] or 0), int(match[1]))
        if place in files_by_rank:
            raise CheckpointError(
                f"{directory}: both {files_by_rank[place].parent.name} and {path.name} are there; "
                "they are of different saves."
            )
        files_by_rank[place] = files[0]
    if not files_by_rank:
        raise CheckpointError(
            f"{directory}: holds no mp_rank_* directories, so it is no legacy Megatron checkpoint."
        )
    stages, tensor_ranks = (1 + max(place[axis] for place in files_by_rank) for axis in (0, 1))
    pipeline = any(path.parent.name.count("_") > 2 for path in files_by_rank.values())
    for stage in range(stages):
        for rank in range(tensor_ranks):
            if (stage, rank) not in files_by_rank:
                name = f"mp_rank_{rank:02d}_{stage:03d}" if pipeline else f"mp_rank_{rank:02d}"
                raise CheckpointError(
                    f"{directory / name}: is missing; there are {len(files_by_rank)} of "
                    f"{stages * tensor_ranks} ranks' files. Copy the whole directory again."
                )
    return files_by_rank


def plain_arguments(arguments: Any) -> dict[str, Any] | None:
    """Return Megatron's arguments as a dict; None if there are none."""
    if isinstance(arguments, argparse.Namespace):
        return dict(vars(arguments))
    return dict(arguments) if isinstance(arguments, Mapping) else None


def _flatten(content: Mapping[str, Any], prefix: str, label: str) -> dict[str, torch.Tensor]:
    """Return the tensors of nested mappings by their joined names."""
    tensors: dict[str, torch.Tensor] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping):
            tensors.update(_flatten(value, f"{name}.", label))
        elif value is not None and not is_no_weight(name):
            raise CheckpointError(
                f"{label}: {shown(name)} is a {type(value).__name__}, where weights should be."
            )
    return tensors


def _chunk(saved: SavedFile, content: Any, label: str) -> dict[str, SavedTensor]:
    """Return the location of every weight of a model chunk by its current name."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{label}: is a {type(content).__name__}, where the model's weights should be."
        )
    tensors: dict[str, SavedTensor] = {}
    for name, tensor in _flatten(content, "", label).items():
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if is_no_weight(name):
            continue
        current = plain_name(
            current_name(name)
            if name.startswith(("language_model.", "word_embeddings_for_head."))
            else name
        )
        if current in tensors:
            raise CheckpointError(f"{label}: {shown(current)} is there twice.")
        tensors[current] = saved.place(tensor)
    return tensors


def read_rank_file(path: Path) -> RankFile:
    """Read the structure of one rank's file, without the tensors' data.

    Raises:
        CheckpointError: The file is damaged, too old, or holds no model.
    """
    saved = SavedFile(path)
    content = saved.content
    saved.content = None  # frees the optimizer state, which may be large
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a dict; it is no checkpoint of "
            "Megatron."
        )
    version = content.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < OLDEST_VERSION:
        raise CheckpointError(
            f"{path}: is of checkpoint version {version}, which orders queries, keys and values "
            f"differently; from {OLDEST_VERSION} on it can be read. Load it in Megatron-LM and "
            "save it again."
        )
    keys = (
        ["model"]
        if "model" in content
        else [f"model{n}" for n in range(sum(bool(re.fullmatch(r"model\d+", k)) for k in content))]
    )
    if not keys or any(key not in content for key in keys):
        raise CheckpointError(
            f"{path}: holds no model (neither 'model' nor 'model0', 'model1', ...)."
        )
    step = content.get("iteration", 0)
    try:
        chunks = [_chunk(saved, content[key], f"{path}: {key}") for key in keys]
    except RecursionError:
        raise CheckpointError(
            f"{shown(path)}: its weights are nested too deeply; this is no checkpoint of Megatron."
        ) from None
    return RankFile(
        saved, chunks, plain_arguments(content.get("args")), step if isinstance(step, int) else 0
    )


def num_layers(chunk: Mapping[str, SavedTensor], label: str) -> int:
    """Return the number of layers in a model chunk.

    Raises:
        CheckpointError: Their numbers have a gap.
    """
    layers = {int(match[1]) for match in map(LAYER.fullmatch, chunk) if match}
    if layers != set(range(len(layers))):
        raise CheckpointError(
            f"{label}: holds layers {sorted(layers)} of its stage, which do not go from 0 on "
            "without a gap."
        )
    return len(layers)
