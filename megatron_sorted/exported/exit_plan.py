"""The exits of a Hugging Face directory, planned before any tensor is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.conversion.hugging_face.config_rules import check_config
from megatron_sorted.conversion.hugging_face.exit_keys import exits_of_config
from megatron_sorted.conversion.hugging_face.families import (
    CONFIG_FILE,
    EXITS_FILE,
    family_of_config,
    num_layers_of_config,
    read_config,
)
from megatron_sorted.conversion.hugging_face.weight_files import HuggingFaceFiles
from megatron_sorted.conversion.tensors.table import check_num_layers
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.reading.shown import shown

# {setting: what each exit has of its own if it is set}.
OWN_PARTS = {
    "use_exit_norm": "norms",
    "untie_exit_output_weights": "heads",
    "use_exit_block": "blocks",
    "use_exit_mlp": "MLPs",
    "exit_adapter_rank": "adapters",
}


@dataclass(frozen=True)
class ExitPlan:
    """The exits of a directory and the parts they own.

    Attributes:
        num_layers: The number of layers of the full model.
        depths: The depths of the exits, increasing; the full model is last.
        own: What intermediate exits have of their own in exits.safetensors: norms, heads, blocks,
            MLPs, adapters.
    """

    num_layers: int
    depths: tuple[int, ...]
    own: tuple[str, ...]


def plan_exits(directory: Path, wanted: Sequence[int] | None = None) -> ExitPlan:
    """Return the exits of a directory: ``wanted``, or those of config.json, or all layers.

    The full model is always one of them. A model that names no exits can be measured at every
    layer; ``load.load_with_exits`` loads its last layer alone.

    Raises:
        CheckpointError: config.json is of no supported family, contradicts itself, or says own
            parts and they are missing.
        SettingsError: A wanted depth is no layer, or not an exit where exits have parts of their
            own.
    """
    config, where = read_config(directory), shown(directory / CONFIG_FILE)
    family_of_config(config, where)
    check_config(config, where)
    layers, exits = num_layers_of_config(config, where), exits_of_config(config, where)
    depths = exits.get("exit_layer_nums") or ()
    own = (
        tuple(what for name, what in OWN_PARTS.items() if exits.get(name))
        if len(depths) > 1
        else ()
    )
    if own and not (directory / EXITS_FILE).is_file():
        raise CheckpointError(
            f"{shown(directory)}: {CONFIG_FILE} says exits have own {', own '.join(own)}, but "
            f"{EXITS_FILE} is missing. Copy the whole directory."
        )
    check_num_layers(layers, HuggingFaceFiles(directory).tensors, shown(directory))
    depths = depths or tuple(range(1, layers + 1))
    for depth in wanted or ():
        if not 1 <= depth <= layers:
            raise SettingsError(
                f"--depths: {depth} is not a layer of {directory} ({layers} layers). Use "
                f"1..{layers}."
            )
        if own and depth not in depths:
            raise SettingsError(
                f"--depths: {directory} has no {' or '.join(own)} of its own for depth {depth}. "
                f"Use some of {', '.join(map(str, depths))}."
            )
    return ExitPlan(layers, tuple(sorted({*wanted, layers})) if wanted else depths, own)
