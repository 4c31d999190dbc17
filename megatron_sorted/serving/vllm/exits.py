"""The exits of an exported directory, as vLLM needs to know them. Needs neither torch nor vLLM."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.conversion.hugging_face.exit_keys import exits_of_config
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.json_text import read_json_object, read_optional_object
from megatron_sorted.reading.shown import shown

EXITS_FILE = "exits.safetensors"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""{model_type: vLLM's class} of the families whose first layers are a model."""
NESTED = "Nested"
"""What the names of our classes, which vLLM knows beside its own, begin with."""


@dataclass(frozen=True)
class Exits:
    """The exits of a directory.

    Attributes:
        directory: The directory.
        family: The model_type.
        depths: Depths of the exits, increasing; the last is the full model.
        norms: Whether every intermediate exit has a norm of its own in exits.safetensors.
        heads: Whether it has an output matrix of its own.
        block: Whether it has a layer of its own before the norm.
        mlp: Whether it has an MLP of its own there.
        adapter_rank: Rank of its low-rank adapter; 0 without one.
        layer_types: What config.json calls the attention of each layer; empty where it names none.
    """

    directory: Path
    family: str
    depths: tuple[int, ...]
    norms: bool = False
    heads: bool = False
    block: bool = False
    mlp: bool = False
    adapter_rank: int = 0
    layer_types: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """Return the file with the exits' own parts."""
        return self.directory / EXITS_FILE

    @property
    def has_full_head(self) -> bool:
        """Return whether the full model's own files have an output matrix.

        Such a directory always has an index.

        Raises:
            DataError: The index is damaged.
        """
        index = read_optional_object(self.directory / "model.safetensors.index.json")
        return "lm_head.weight" in index.get("weight_map", {})

    def has_parts_at(self, depth: int) -> bool:
        """Return whether an exit has anything of its own; the full model never has."""
        parts = self.norms or self.heads or self.block or self.mlp or self.adapter_rank
        return bool(parts) and depth != self.depths[-1]

    def num_layers_at(self, depth: int) -> int:
        """Return the number of layers of an exit's model; a block of its own is the last one."""
        return depth + (self.block and depth != self.depths[-1])

    def overrides_at(self, depth: int) -> dict[str, Any]:
        """Return the keys of config.json that make vLLM build an exit's model, with our class."""
        overrides: dict[str, Any] = {
            "architectures": [NESTED + ARCHITECTURES[self.family]],
            "num_hidden_layers": self.num_layers_at(depth),
        }
        if self.heads and depth != self.depths[-1]:
            overrides["tie_word_embeddings"] = False
        if self.layer_types:
            layers = self.num_layers_at(depth)
            overrides["layer_types"] = [*self.layer_types, *self.layer_types[-1:]][:layers]
        return overrides


def read_exits_of(directory: Path) -> Exits:
    """Return the exits of a directory; nothing but config.json is read.

    Raises:
        CheckpointError: It is no directory of a supported family, names no exits, or its exits have
            parts of their own that are missing.
        DataError: config.json is damaged.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{shown(directory)}: no directory with config.json. Give an exported model: "
            "megatron-sorted convert export CHECKPOINT DIRECTORY."
        )
    config = read_json_object(path)
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise CheckpointError(
            f"{shown(path)}: model_type {shown(str(family))} is none of "
            f"{', '.join(ARCHITECTURES)}, whose first layers the plug-in can run. Serve this model "
            "without it."
        )
    keys = exits_of_config(config, shown(path))
    depths = keys.get("exit_layer_nums", ())
    if len(depths) < 2:
        raise CheckpointError(
            f"{shown(path)}: exit_layer_indices names no exit before the last layer. Train exits, "
            "or serve this model without the plug-in (strategy full)."
        )
    exits = Exits(
        directory,
        family,
        depths,
        keys["use_exit_norm"],
        keys["untie_exit_output_weights"],
        keys["use_exit_block"],
        keys["use_exit_mlp"],
        keys["exit_adapter_rank"],
        _layer_types(config.get("layer_types"), depths[-1], shown(path)),
    )
    if exits.has_parts_at(depths[0]) and not exits.file.is_file():
        raise CheckpointError(
            f"{shown(path)}: exits have parts of their own, but {EXITS_FILE} is missing. Copy the "
            "whole directory."
        )
    return exits


def _layer_types(value: object, layers: int, where: str) -> tuple[str, ...]:
    """Return the kinds of attention of the layers.

    Raises:
        CheckpointError: It is no list of a name for each layer.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or [type(one) for one in value] != [str] * layers:
        raise CheckpointError(
            f"{where}: layer_types is no list of a name for each of the {layers} layers. Correct "
            "or remove it."
        )
    return tuple(value)
