"""What a Hugging Face directory says about its exits, before any tensor is read."""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.checkpoint.layout import TRACKER
from megatron_sorted.checkpoint.manifest import MANIFEST
from megatron_sorted.conversion.exporting import export_model
from megatron_sorted.conversion.hugging_face.config_rules import check_config
from megatron_sorted.conversion.hugging_face.exit_keys import exits_of_config
from megatron_sorted.conversion.hugging_face.families import (
    CONFIG,
    EXITS,
    family_of_config,
    num_layers_of_config,
    read_config,
)
from megatron_sorted.conversion.hugging_face.weight_files import HuggingFaceFiles, check_has_weights
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.tensors.table import check_num_layers
from megatron_sorted.conversion.writing import Writing
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.reading.shown import shown

# What an exit may own, by the setting that says so.
OWN = {
    "use_exit_norm": "norms",
    "untie_exit_output_weights": "heads",
    "use_exit_block": "blocks",
    "use_exit_mlp": "MLPs",
    "exit_adapter_rank": "adapters",
}


@dataclass(frozen=True)
class ExitPlan:
    """Which exits a directory has, and what is their own.

    Attributes:
        num_layers: Layers of the full model.
        depths: Exits to evaluate, increasing, the full model last.
        own: What intermediate exits have of their own in exits.safetensors: norms, heads, blocks, MLPs, adapters.
    """

    num_layers: int
    depths: tuple[int, ...]
    own: tuple[str, ...]


def open_model_directory(path: Path) -> Path:
    """Return the Hugging Face directory to evaluate for what the user named; a checkpoint is exported into one that goes with the process.

    Raises:
        CheckpointError: It is no model directory, or a checkpoint that no Hugging Face family computes.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such directory. Give a Hugging Face directory or one of checkpoints."
        )
    if (
        (path / MANIFEST).is_file()
        or (path / TRACKER).is_file()
        or any(path.glob("iter_*"))
        or any(path.glob("mp_rank_*"))
    ):
        return _export(path)
    if not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path}: no config.json. Give a Hugging Face directory with config.json and *.safetensors."
        )
    check_has_weights(path)
    return path


def _export(path: Path) -> Path:
    """Return the Hugging Face directory made of a checkpoint; it is removed when the process ends."""
    model = open_model(path)
    folder = Path(tempfile.mkdtemp(prefix="evaluate_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print(f"exporting {model.directory} ({model.num_bytes / 1e6:,.1f} MB) to {folder}", flush=True)
    # evaluating is reading every number of it
    export_model(model, folder / path.resolve().name, Writing(verify=False))
    return folder / path.resolve().name


def plan_exits(directory: Path, wanted: Sequence[int] | None = None) -> ExitPlan:
    """Return the exits of a directory: ``wanted``, by default those of config.json, by default all layers; the last always.

    Raises:
        CheckpointError: config.json is of no supported family, contradicts itself, or says own parts and they are missing.
        SettingsError: A wanted depth is no layer, or not an exit where exits have parts of their own.
    """
    config, where = read_config(directory), shown(directory / CONFIG)
    family_of_config(config, where)
    check_config(config, where)
    layers, exits = num_layers_of_config(config, where), exits_of_config(config, where)
    depths = exits.get("exit_layer_nums") or ()
    own = tuple(what for name, what in OWN.items() if exits.get(name)) if len(depths) > 1 else ()
    if own and not (directory / EXITS).is_file():
        raise CheckpointError(
            f"{shown(directory)}: {CONFIG} says exits have own {', own '.join(own)}, but {EXITS} is missing. "
            "Copy the whole directory."
        )
    check_num_layers(layers, HuggingFaceFiles(directory).tensors, shown(directory))
    depths = depths or tuple(range(1, layers + 1))
    for depth in wanted or ():
        if not 1 <= depth <= layers:
            raise SettingsError(
                f"--depths: {depth} is not a layer of {directory} ({layers} layers). Use 1..{layers}."
            )
        if own and depth not in depths:
            raise SettingsError(
                f"--depths: {directory} has no {' or '.join(own)} of its own for depth {depth}. "
                f"Use some of {', '.join(map(str, depths))}."
            )
    return ExitPlan(layers, tuple(sorted({*wanted, layers})) if wanted else depths, own)
