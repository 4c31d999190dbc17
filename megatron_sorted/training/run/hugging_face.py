"""Starts a run from a Hugging Face directory, or ends it with one."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.candidates import Candidate
from megatron_sorted.checkpoint.layout import iteration_directory
from megatron_sorted.checkpoint.manifest import WEIGHTS_ONLY, network_shape, with_new_parts
from megatron_sorted.conversion.exporting import export_model
from megatron_sorted.conversion.hugging_face.families import CONFIG_FILE, family_of_settings
from megatron_sorted.conversion.importing import tokenizer_description
from megatron_sorted.conversion.open_model import OpenModel, files_beside, open_model
from megatron_sorted.conversion.staging import check_destination
from megatron_sorted.conversion.verifying.transformers_states import require_transformers
from megatron_sorted.conversion.writing import WriteOptions
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.load import settings_as_dict
from megatron_sorted.settings.run import Settings

KIND = "hugging_face"
EXPORT = "export.json"  # names the run whose export --save-hf holds; that run may replace it


def hugging_face_candidate(root: Path, settings: Settings) -> Candidate:
    """Return a Hugging Face directory as a checkpoint of weights only, from which a run can start.

    Raises:
        CheckpointError: The directory is incomplete, unsupported, or contradicts itself.
    """
    model = open_model(root)
    manifest = {
        "contents": WEIGHTS_ONLY,
        "kind": KIND,
        "run_id": "",
        "saved_at": "",
        "shape": network_shape(model.settings, model.settings.vocab_size),
        "files": {},
        "sha256": _identity(root),
        "settings": settings_as_dict(model.settings),
        "progress": {"step": 0, "samples": 0},
        "tokenizer": tokenizer_description(model),
    }
    return Candidate(root, with_new_parts(manifest, settings))


def _identity(root: Path) -> str:
    """Return a hash that identifies a Hugging Face directory.

    It covers config.json and the names and sizes of the weight files.
    """
    weights = sorted((path.name, path.stat().st_size) for path in root.glob("*.safetensors"))
    return hashlib.sha256(
        json.dumps(weights).encode() + (root / CONFIG_FILE).read_bytes()
    ).hexdigest()


def is_hugging_face_candidate(candidate: Candidate) -> bool:
    """Return whether a run starts from a Hugging Face directory."""
    return candidate.manifest.get("kind") == KIND


def carried_files_of(directory: Path) -> dict[str, bytes]:
    """Return the small files that every checkpoint of a run from this directory carries.

    The result maps the name within a checkpoint to the content.
    """
    return {name: path.read_bytes() for name, path in files_beside(directory).items()}


def exports(settings: Settings) -> dict[str, Path]:
    """Return {"last" or "averaged": the directory to which --save-hf exports these weights}."""
    destination, weights = Path(settings.save_hf), settings.save_hf_weights
    if weights != "both":
        return {weights: destination}
    return {kind: destination / kind for kind in ("last", "averaged")}


def check_export(settings: Settings) -> None:
    """Check that --save-hf can be written when training is done.

    Raises:
        SettingsError: No Hugging Face family computes this network, or the directory holds
            something else.
    """
    if settings.save_hf is None:
        return
    try:
        family_of_settings(settings)
        for destination in exports(settings).values():
            check_destination(destination, (destination / EXPORT).is_file(), 0)
    except CheckpointError as error:
        raise SettingsError(f"--save-hf: {error}") from error


def check_export_of_run(settings: Settings, run_id: str) -> None:
    """Check that --save-hf names no export of another run, which this one would replace.

    Raises:
        CheckpointError: It holds one.
    """
    for destination in exports(settings).values():
        path, other = destination / EXPORT, "unknown"
        if not os.path.lexists(path):
            continue
        with suppress(CheckpointError):
            other = str(read_json_object(path, error=CheckpointError).get("run_id", other))
        if other != run_id:
            raise CheckpointError(
                f"--save-hf: {destination} holds the export of run {shown(other)}, this one is "
                f"run {run_id}. Give another directory."
            )


def export_last(settings: Settings, step: int, run_id: str, log: Callable[..., None]) -> None:
    """Write the last checkpoint as a Hugging Face directory, verified if transformers is installed.

    With --save-hf-weights it is that of averaged weights, or one of each kind. Only one process may
    call it.

    Raises:
        CheckpointError: The directory could not be written; the checkpoint is complete.
    """
    try:
        require_transformers()
        verify = True
    except CheckpointError:
        verify = False
    for weights, destination in exports(settings).items():
        model = open_model(iteration_directory(settings.save, step), weights=weights)
        _export(
            model, destination, verify, {"run_id": run_id, "step": step, "weights": weights}, log
        )


def _export(
    model: OpenModel,
    destination: Path,
    verify: bool,
    origin: Mapping[str, Any],
    log: Callable[..., None],
) -> None:
    log(f"exporting to {destination} ({model.num_bytes / 1e6:,.1f} MB)")
    written = export_model(
        model,
        destination,
        WriteOptions((destination / EXPORT).is_file(), verify),
        more_files={EXPORT: json.dumps(origin) + "\n"},
    )
    for note in written.notes:
        log(note)
    comparison = written.comparison
    if comparison is None:
        log(f"wrote {destination}; not verified, since transformers is not installed")
        return
    worst = max(comparison.exits, key=lambda row: row.largest_difference)
    log(
        f"wrote {destination}; verified: {len(comparison.tensors)} tensors equal, logits of "
        f"{len(comparison.exits)} exits equal those of transformers within "
        f"{worst.largest_difference:.1g} (largest logit {worst.largest_logit:.3g})"
    )
