"""The model families of Hugging Face that are trained here, and what sets each apart. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sorted.conversion.hugging_face.config_rules import is_count, told
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.run import Settings

CONFIG = "config.json"
EXITS = "exits.safetensors"  # what intermediate exits own (norms, heads, blocks, MLPs, adapters); plain transformers does not look at it
DTYPES = ("float32", "bfloat16", "float16")
MOST_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True)
class Family:
    """What sets one family apart from LLaMA.

    Attributes:
        model_type, architecture: As config.json names them.
        qkv_bias: Queries, keys and values have a bias.
        qk_norm: Queries and keys of every head are normed.
        slides: All layers look back over ``sliding_window`` tokens, if config.json gives one.
        absent: What transformers takes for keys that config.json leaves out.
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
    """Return the config.json of a Hugging Face directory.

    Raises:
        CheckpointError: There is none, or it is no JSON object of reasonable size and nesting.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{shown(directory)}: no {CONFIG}, so this is no Hugging Face model. Give a directory that holds "
            "config.json and safetensors."
        )
    return read_json_object(path, "Fetch it again.", CheckpointError, MOST_CONFIG_BYTES)


def family_of_config(config: Mapping[str, Any], where: str) -> Family:
    """Return the family a config.json is of.

    Raises:
        CheckpointError: None that is supported; says which are.
    """
    said = config.get("model_type")
    family = FAMILIES.get(said) if isinstance(said, str) else None
    known = ", ".join(
        f"{family.model_type} ({family.architecture})" for family in FAMILIES.values()
    )
    if family is None:
        raise CheckpointError(
            f"{where}: model_type {told(said)} is not supported. Supported are {known}."
        )
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise CheckpointError(
            f"{where}: architectures {shown(architectures, 60)} is not a language model of a supported kind. "
            f"Supported are {known}."
        )
    return family


def num_layers_of_config(config: Mapping[str, Any], where: str) -> int:
    """Return the number of layers.

    Raises:
        CheckpointError: It is no number above 0.
    """
    return count_of_config(config, "num_hidden_layers", where)


def max_length_of_config(config: Mapping[str, Any]) -> int:
    """Return the longest sequence a supported model can be used with."""
    return (
        config.get("max_position_embeddings")
        or FAMILIES[config["model_type"]].absent["max_position_embeddings"]
    )


def count_of_config(config: Mapping[str, Any], key: str, where: str) -> int:
    """Return a number above 0 of a config.json.

    Raises:
        CheckpointError: It is none.
    """
    if not is_count(config.get(key)):
        raise CheckpointError(
            f"{where}: {key} is {told(config.get(key))} where a number above 0 is needed. Fetch the file again."
        )
    return config[key]


def family_of_settings(settings: Settings) -> Family:
    """Return the family whose models compute what a network of these settings computes.

    Raises:
        CheckpointError: There is none, naming the setting that none has.
    """
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
                f"--{name.replace('_', '-')}: {getattr(settings, name)}, which no supported Hugging Face family has "
                f"(only {value}). Such a model stays a Megatron checkpoint."
            )
    for family in FAMILIES.values():
        if (family.qkv_bias, family.qk_norm, family.slides) == (
            settings.add_qkv_bias,
            settings.qk_layernorm,
            settings.sliding_window is not None,
        ):
            return family
    raise CheckpointError(
        "--add-qkv-bias, --qk-layernorm and --sliding-window: no supported Hugging Face family has them together."
    )
