"""The Hugging Face model families supported here, and how they differ. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sorted.conversion.hugging_face.config_rules import is_count, shown_value
from megatron_sorted.conversion.hugging_face.rope_settings import check_rope_is_exportable
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.run import Settings

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
EXITS_FILE = "exits.safetensors"
"""Norms, heads, blocks, MLPs and adapters of intermediate exits; plain transformers ignores it."""
DTYPES = ("float32", "bfloat16", "float16")
MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True)
class Family:
    """How one family differs from LLaMA.

    Attributes:
        model_type, architecture: The names in config.json.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: Whether queries and keys of every head are normed.
        slides: Whether all layers attend to ``sliding_window`` tokens, if config.json sets it.
        absent: The values that transformers assumes for keys that config.json leaves out.
    """

    model_type: str
    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    slides: bool = False
    absent: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", absent={"max_position_embeddings": 2048}),
        Family(
            "mistral",
            "MistralForCausalLM",
            slides=True,
            absent={
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            qkv_bias=True,
            absent={"max_position_embeddings": 32768, "num_key_value_heads": 32},
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            qk_norm=True,
            absent={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        ),
    )
}


def read_config(directory: Path) -> dict[str, Any]:
    """Read the config.json of a Hugging Face directory.

    Raises:
        CheckpointError: The file is missing, or is no JSON object of reasonable size and nesting.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{shown(directory)}: no {CONFIG_FILE}, so this is no Hugging Face model. Give a "
            "directory that holds config.json and safetensors."
        )
    return read_json_object(path, "Fetch it again.", CheckpointError, MAX_CONFIG_BYTES)


def family_of_config(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of the model that a config.json describes.

    Raises:
        CheckpointError: The family is not supported. The message names those that are.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    known = ", ".join(
        f"{family.model_type} ({family.architecture})" for family in FAMILIES.values()
    )
    if family is None:
        raise CheckpointError(
            f"{where}: model_type {shown_value(model_type)} is not supported. Supported are "
            f"{known}."
        )
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise CheckpointError(
            f"{where}: architectures {shown(architectures, 60)} is not a language model of a "
            f"supported kind. Supported are {known}."
        )
    return family


def num_layers_of_config(config: Mapping[str, Any], where: str) -> int:
    """Return the number of layers.

    Raises:
        CheckpointError: The value is no whole number above 0.
    """
    return count_of_config(config, "num_hidden_layers", where)


def max_length_of_config(config: Mapping[str, Any]) -> int:
    """Return the longest sequence that a supported model can process, in tokens."""
    return (
        config.get("max_position_embeddings")
        or FAMILIES[config["model_type"]].absent["max_position_embeddings"]
    )


def attention_window(config: Any, layer: int) -> int | None:
    """Return the number of tokens that a layer attends to; None if all.

    Args:
        config: transformers' configuration of a model.
        layer: The index of the layer, from 0.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def count_of_config(config: Mapping[str, Any], key: str, where: str) -> int:
    """Return the value of a key of config.json that must be a whole number above 0.

    Raises:
        CheckpointError: It is not.
    """
    if not is_count(config.get(key)):
        raise CheckpointError(
            f"{where}: {key} is {shown_value(config.get(key))} where a number above 0 is needed. "
            "Fetch the file again."
        )
    return config[key]


def family_of_settings(settings: Settings) -> Family:
    """Return the family whose models compute what a network of these settings computes.

    Raises:
        CheckpointError: No family does. The message names the setting that no family supports.
    """
    check_rope_is_exportable(settings)
    needed = {
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "num_experts": None,
        "use_sandwich_norm": False,
    }
    for name, value in needed.items():
        if getattr(settings, name) != value:
            raise CheckpointError(
                f"--{name.replace('_', '-')}: {getattr(settings, name)}, which no supported "
                f"Hugging Face family has (only {value}). Such a model stays a Megatron checkpoint."
            )
    for family in FAMILIES.values():
        if (family.qkv_bias, family.qk_norm, family.slides) == (
            settings.add_qkv_bias,
            settings.qk_layernorm,
            settings.sliding_window is not None,
        ):
            return family
    raise CheckpointError(
        "--add-qkv-bias, --qk-layernorm and --sliding-window: no supported Hugging Face family "
        "has them together."
    )
