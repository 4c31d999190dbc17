"""What a Hugging Face directory says about its exits, before any tensor is read."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.checkpoint.layout import TRACKER
from megatron_sorted.checkpoint.manifest import MANIFEST
from megatron_sorted.conversion.convert import export_model
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.errors import CheckpointError, SettingsError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose logits are head(norm(hidden state)) and nothing else."""


@dataclass(frozen=True)
class ExitPlan:
    """Which exits a directory has, and what is their own.

    Attributes:
        num_layers: Layers of the full model.
        depths: Exits to evaluate, increasing, the full model last.
        own_norms: Intermediate exits have a norm of their own, in exits.safetensors.
        own_heads: Intermediate exits have a head of their own, in exits.safetensors.
    """

    num_layers: int
    depths: tuple[int, ...]
    own_norms: bool
    own_heads: bool


def open_model_directory(path: Path) -> Path:
    """Returns the Hugging Face directory to evaluate for what the user named; a checkpoint is exported into one that goes with the process.

    Raises:
        CheckpointError: It is no model directory, or a checkpoint that no Hugging Face family computes.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory. Give a Hugging Face directory or one of checkpoints.")
    if (path / MANIFEST).is_file() or (path / TRACKER).is_file() or any(path.glob("iter_*")) or any(path.glob("mp_rank_*")):
        return _export(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json. Give a Hugging Face directory with config.json and *.safetensors.")
    if not any(path.glob("model*.safetensors")):
        raise CheckpointError(f"{path}: no model*.safetensors; files of other kinds can run code when they are read. "
                              "Give a directory whose weights are safetensors.")
    return path


def _export(path: Path) -> Path:
    """Returns the Hugging Face directory made of a checkpoint; it is removed when the process ends."""
    model = open_model(path)
    folder = Path(tempfile.mkdtemp(prefix="evaluate_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print(f"exporting {model.directory} ({model.num_bytes / 1e6:,.1f} MB) to {folder}", flush=True)
    export_model(model, folder / path.resolve().name, verify=False)  # evaluating is reading every number of it
    return folder / path.resolve().name


def read_config(directory: Path) -> dict:
    """Returns config.json as it is written.

    Raises:
        CheckpointError: It is not a JSON object, or of a family whose exits cannot be read.
    """
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / 'config.json'}: cannot be read ({error}). Give an intact directory.") from error
    if not isinstance(config, dict) or config.get("model_type") not in FAMILIES:
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{directory}: model_type {kind!r} is not supported. Give one of {', '.join(FAMILIES)}.")
    if not _is_count(config.get("num_hidden_layers")):
        raise CheckpointError(f"{directory}: config.json says num_hidden_layers {config.get('num_hidden_layers')!r}, which is no number of "
                              "layers. Give an intact directory.")
    return config


def plan_exits(directory: Path, wanted: Sequence[int] | None = None) -> ExitPlan:
    """Returns the exits of a directory: ``wanted``, by default those of config.json, by default all layers; the last always.

    Raises:
        CheckpointError: config.json contradicts itself, or says own norms or heads and exits.safetensors is missing.
        SettingsError: A wanted depth is no layer, or an exit whose norm or head does not exist.
    """
    config = read_config(directory)
    layers = config["num_hidden_layers"]
    listed = config.get("exit_layer_indices")
    own_norms, own_heads = bool(config.get("own_exit_norms", False)), not config.get("tie_exit_lm_head", True)
    if listed is not None and not (isinstance(listed, list) and listed and all(_is_count(depth) and depth <= layers for depth in listed)
                                   and len(set(listed)) == len(listed)):
        raise CheckpointError(f"{directory}: exit_layer_indices {listed} of config.json are not different layers of 1..{layers}. "
                              "Export the model again.")
    if (own_norms or own_heads) and listed is None:
        raise CheckpointError(f"{directory}: config.json speaks of the exits' own norms or heads but has no exit_layer_indices. "
                              "Export the model again.")
    if (own_norms or own_heads) and not (directory / "exits.safetensors").is_file():
        raise CheckpointError(f"{directory}: config.json says that exits have own {'heads' if own_heads else 'norms'}, but "
                              "exits.safetensors is missing. Copy the whole directory.")
    exits = {*(listed or range(1, layers + 1)), layers}
    for depth in wanted or ():
        if not 1 <= depth <= layers:
            raise SettingsError(f"--depths: {depth} is not a layer of {directory} ({layers} layers). Use 1..{layers}.")
        if (own_norms or own_heads) and depth not in exits:
            raise SettingsError(f"--depths: {directory} has no norm or head of its own for depth {depth}. "
                                f"Use some of {', '.join(map(str, sorted(exits)))}.")
    return ExitPlan(layers, tuple(sorted({*wanted, layers} if wanted else exits)), own_norms, own_heads)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
