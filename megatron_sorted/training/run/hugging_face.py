"""A run that starts from a Hugging Face directory, or ends in one."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_sorted.checkpoint.candidates import Candidate
from megatron_sorted.checkpoint.layout import iteration_directory
from megatron_sorted.checkpoint.manifest import WEIGHTS_ONLY, network_shape, with_new_parts
from megatron_sorted.checkpoint.sharding.sharded import weights_in_place
from megatron_sorted.conversion.exporting import export_model
from megatron_sorted.conversion.hugging_face.families import CONFIG, family_of_settings
from megatron_sorted.conversion.importing import tokenizer_description
from megatron_sorted.conversion.open_model import files_beside, open_model
from megatron_sorted.conversion.origins import origin_of
from megatron_sorted.conversion.staging import check_destination
from megatron_sorted.conversion.verifying.transformers_states import require_transformers
from megatron_sorted.conversion.writing import Writing
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.load import settings_as_dict
from megatron_sorted.settings.lora import is_adapter
from megatron_sorted.settings.run import Settings

KIND = "hugging_face"
EXPORT = "export.json"  # says of which run a directory of --save-hf is, which may then replace it


def hugging_face_candidate(root: Path, settings: Settings) -> Candidate:
    """Return a Hugging Face directory as a checkpoint of weights only that a run can start from.

    Raises:
        CheckpointError: It is incomplete, unsupported, or contradicts itself.
    """
    model = open_model(root)
    shape = network_shape(model.settings, model.settings.vocab_size)
    manifest = {
        "contents": WEIGHTS_ONLY,
        "kind": KIND,
        "run_id": "",
        "saved_at": "",
        "shape": shape,
        "files": {},
        "sha256": _identity(root),
        "settings": settings_as_dict(model.settings),
        "progress": {"step": 0, "samples": 0},
        "tokenizer": tokenizer_description(model),
    }
    return Candidate(root, with_new_parts(manifest, settings))


def _identity(root: Path) -> str:
    """Return a hash by which a Hugging Face directory is known again: its config.json, and names and sizes of its weight files."""
    weights = sorted((path.name, path.stat().st_size) for path in root.glob("*.safetensors"))
    return hashlib.sha256(json.dumps(weights).encode() + (root / CONFIG).read_bytes()).hexdigest()


def is_hugging_face_candidate(candidate: Candidate) -> bool:
    """Return whether a run starts from a Hugging Face directory."""
    return candidate.manifest.get("kind") == KIND


def load_by_name(directory: Path, settings: Settings, chunks: list, optimizer) -> None:
    """Take the weights of a Hugging Face directory, or of a checkpoint whose exits lack parts of this run's, into this rank's chunks.

    Parts of exits that are not there begin as ``conversion.origins.origin_of`` says.

    Every rank reads the tensors of its own layers, one at a time, and keeps its part of each; no rank waits for another.

    Raises:
        CheckpointError: A tensor cannot be read.
    """
    model = open_model(directory)
    for chunk in chunks:
        state = weights_in_place(chunk)
        apply_factories(
            state
        )  # gate and up of an MLP are one parameter and two shards: views of it
        shards: dict[str, list[ShardedTensor]] = {}
        for shard in nested_values(state):
            if isinstance(shard, ShardedTensor) and not is_adapter(
                shard.key
            ):  # new ones begin as they were made
                shards.setdefault(_name_of(shard), []).append(shard)
        with torch.no_grad():
            for name, of_tensor in shards.items():
                origin = origin_of(name, model, settings)
                if origin is None:
                    continue
                whole = model.read_ours(origin)
                for shard in of_tensor:
                    _copy_part(whole, shard)
    if hasattr(optimizer, "reload_model_params"):
        optimizer.reload_model_params()


def _name_of(shard: ShardedTensor) -> str:
    """Return the name of a tensor with its layer's index, which Megatron keeps as an offset."""
    if shard.prepend_axis_num == 0:
        return shard.key
    return shard.key.replace("decoder.layers.", f"decoder.layers.{shard.global_offset[0]}.", 1)


def _copy_part(whole: torch.Tensor, shard: ShardedTensor) -> None:
    offsets = shard.global_offset[shard.prepend_axis_num :]
    source = whole[
        tuple(
            slice(begin, begin + size)
            for begin, size in zip(offsets, shard.local_shape, strict=True)
        )
    ]
    target = shard.data.view(shard.local_shape)
    # a rank may hold rows that pad the vocabulary: they stay as they were made
    target[tuple(slice(0, size) for size in source.shape)].copy_(source)


def carried_files_of(directory: Path) -> dict[str, bytes]:
    """Return the content of the small files that go on into every checkpoint of a run that starts here, by name within one."""
    return {name: path.read_bytes() for name, path in files_beside(directory).items()}


def check_export(settings: Settings) -> None:
    """Check that --save-hf can be written when training is done.

    Raises:
        SettingsError: No Hugging Face family computes this network, or the directory holds something else.
    """
    if settings.save_hf is None:
        return
    destination = Path(settings.save_hf)
    try:
        family_of_settings(settings)
        check_destination(destination, (destination / EXPORT).is_file(), 0)
    except CheckpointError as error:
        raise SettingsError(f"--save-hf: {error}") from error


def check_export_of_run(settings: Settings, run_id: str) -> None:
    """Check that --save-hf names no export of another run, which this one would replace.

    Raises:
        CheckpointError: It does.
    """
    path = Path(settings.save_hf) / EXPORT
    if not os.path.lexists(path):
        return
    other = "unknown"
    with suppress(CheckpointError):
        other = str(read_json_object(path, error=CheckpointError).get("run_id", other))
    if other != run_id:
        raise CheckpointError(
            f"--save-hf: {settings.save_hf} holds the export of run {shown(other)}, this one is run {run_id}. "
            "Give another directory."
        )


def export_last(settings: Settings, step: int, run_id: str, say: Callable[..., None]) -> None:
    """Write the Hugging Face directory of the last checkpoint, verified where transformers is installed. One process does it.

    Raises:
        CheckpointError: It could not be written; the checkpoint is complete.
    """
    destination = Path(settings.save_hf)
    try:
        require_transformers()
        verify = True
    except CheckpointError:
        verify = False
    model = open_model(iteration_directory(settings.save, step))
    say(f"exporting to {destination} ({model.num_bytes / 1e6:,.1f} MB)")
    written = export_model(
        model,
        destination,
        Writing((destination / EXPORT).is_file(), verify),
        more_files={EXPORT: json.dumps({"run_id": run_id, "step": step}) + "\n"},
    )
    comparison = written.comparison
    for note in written.notes:
        say(note)
    if comparison is None:
        say(f"wrote {destination}; not verified, since transformers is not installed")
        return
    worst = max(comparison.exits, key=lambda row: row.largest_difference)
    say(
        f"wrote {destination}; verified: {len(comparison.tensors)} tensors equal, logits of {len(comparison.exits)} exits equal those of "
        f"transformers within {worst.largest_difference:.1g} (largest logit {worst.largest_logit:.3g})"
    )
