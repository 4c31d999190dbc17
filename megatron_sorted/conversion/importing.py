"""Import of any model as one of our checkpoints, weights only, verified before it gets its name."""

import dataclasses
import platform
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sorted import __version__
from megatron_sorted.checkpoint.layout import TRACKER, iteration_directory
from megatron_sorted.checkpoint.manifest import (
    MANIFEST,
    WEIGHTS_ONLY,
    Progress,
    exits_description,
    manifest_text,
    network_shape,
)
from megatron_sorted.conversion.megatron.checkpoint_files import WeightsWriter
from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.origins import NetworkOrigin, RequestedExits, whole_network
from megatron_sorted.conversion.staging import staged_directory
from megatron_sorted.conversion.tensors.source import Overlay, TensorInfo
from megatron_sorted.conversion.tensors.table import TensorPair, tensor_table
from megatron_sorted.conversion.verifying.transformers_states import require_transformers
from megatron_sorted.conversion.writing import ConversionResult, WriteOptions
from megatron_sorted.errors import CheckpointError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.settings.load import settings_as_dict
from megatron_sorted.settings.run import Settings


def import_model(
    model: OpenModel, destination: Path, exits: RequestedExits, writing: WriteOptions | None = None
) -> ConversionResult:
    """Write a model as a checkpoint that loads in any parallel layout.

    Args:
        model: A model of any kind.
        destination: A new directory of checkpoints.
        exits: The exits that the checkpoint is to have.
        writing: Options; by default the result is verified and nothing is overwritten.

    Raises:
        CheckpointError: The destination exists, the disk is full, or the two models differ. The
            destination is then left as it was.
        SettingsError: An exit is not a layer of the model.
    """
    writing = writing or WriteOptions()
    if writing.verify and model.kind == "hugging_face":
        require_transformers()
    settings = exits.applied_to(model.settings)
    pairs, origins = tensor_table(settings), whole_network(model, settings).origins
    if left := [pair.ours for pair in model.pairs if pair not in origins.values()]:
        raise CheckpointError(
            f"{model.directory}: the requested exits leave {', '.join(left[:3])} "
            "unused. Keep the exits it has."
        )
    if new := [pair.ours for pair in pairs if pair.ours not in origins]:
        raise CheckpointError(
            f"{model.directory}: no tensor of it can initialize {', '.join(new[:3])}. Keep the "
            "exits it has; a run that loads the model creates new adapters (--exit-adapter-rank)."
        )
    tensors = {
        pair.ours: TensorInfo(pair.shape, model.dtype_of(origins[pair.ours])) for pair in pairs
    }
    total = sum(info.num_bytes for info in tensors.values())
    with staged_directory(destination, writing.overwrite, total, model.directory) as staged:
        directory = iteration_directory(staged, 0)
        directory.mkdir()
        writer = WeightsWriter(directory, tensors, settings.num_layers)
        count = writing.watch("converting", total)
        try:
            for pair in pairs:
                writer.write(pair.ours, model.read_ours(origins[pair.ours]))
                count(tensors[pair.ours].num_bytes)
            files = writer.close({name: path.read_bytes() for name, path in model.files.items()})
        except BaseException:
            writer.abandon()
            raise
        text = manifest_text(_description(model, settings), Progress(0, 0), files)
        (directory / MANIFEST).write_text(text, encoding="utf-8")
        write_text_atomically(staged / TRACKER, "0")
        network = NetworkOrigin(_with_parts(model, settings, origins), settings, origins)
        return ConversionResult(writing.verify_written(network, staged, total, destination))


def _with_parts(
    model: OpenModel, settings: Settings, origins: Mapping[str, TensorPair]
) -> OpenModel:
    """Return the model with the parts of exits that ``settings`` add to it.

    The comparison needs them: with these parts the exits compute other logits than before.
    """
    source, pairs, own = model.source, tensor_table(settings), {pair.ours for pair in model.pairs}
    origin_names: dict[str, str] = {}
    for pair in (pair for pair in pairs if pair.ours not in own):
        origin = origins[pair.ours]
        origin_names |= (
            {pair.ours: origin.ours}
            if model.kind == "megatron"
            else dict(zip(pair.theirs, origin.theirs, strict=True))
        )
    parts = {
        name: (source.tensors[origin], partial(source.read, origin))
        for name, origin in origin_names.items()
    }
    return dataclasses.replace(model, settings=settings, pairs=pairs, source=Overlay(source, parts))


def tokenizer_description(model: OpenModel) -> dict[str, Any] | None:
    """Return the description of a model's tokenizer for a manifest; None if it has no tokenizer.

    Raises:
        DataError: The tokenizer cannot be read.
    """
    tokenizer = model.open_tokenizer()
    if tokenizer is None:
        return model.manifest["tokenizer"] if model.manifest else None
    description = {
        "type": type(tokenizer).__name__,
        "name": tokenizer.name,
        "sha256": tokenizer.sha256,
    }
    # Files of one tokenizer in several formats have several hashes.
    return description | ({"hashes": sorted(tokenizer.hashes)} if len(tokenizer.hashes) > 1 else {})


def _description(model: OpenModel, settings: Settings) -> dict[str, Any]:
    """Return the content of an imported checkpoint's manifest, apart from progress and files."""
    tokenizer = tokenizer_description(model)
    if tokenizer is not None:
        settings = dataclasses.replace(settings, tokenizer_type=tokenizer["type"])
    now = datetime.now(timezone.utc)
    return {
        "contents": WEIGHTS_ONLY,
        "run_id": uuid.uuid4().hex[:8],
        "saved_at": now.isoformat(timespec="milliseconds"),
        "origin": {"name": model.directory.name, "kind": model.kind},
        "versions": {
            "megatron_sorted": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "exits": exits_description(settings),
        "shape": network_shape(settings, settings.vocab_size),
        "settings": settings_as_dict(settings),
        "layout": {
            "world_size": 1,
            "tensor": 1,
            "stages": 1,
            "data": 1,
            "chunks": 1,
            "random_place": [1, 1],
        },
        "samples_a_step": 1,
        "tokenizer": tokenizer,
        "data": None,
    }
