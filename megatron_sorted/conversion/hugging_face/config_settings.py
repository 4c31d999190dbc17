"""Translation of a config.json into our settings and back.

Together with `config_rules` (rules for values), `exit_keys`, `rope_keys` and `rope_settings`, the
only modules that know its keys.
"""

from collections.abc import Mapping
from typing import Any

from megatron_sorted.conversion.hugging_face.config_rules import (
    NAME_CODE,
    check_config,
    shown_value,
)
from megatron_sorted.conversion.hugging_face.exit_keys import (
    exits_of_config,
    keys_of_exits,
    without_exits,
)
from megatron_sorted.conversion.hugging_face.families import (
    FAMILIES,
    count_of_config,
    family_of_config,
    family_of_settings,
)
from megatron_sorted.conversion.hugging_face.rope_settings import (
    RESONANCE_KEY,
    rope_keys,
    rope_settings_of_config,
    written_max_positions,
)
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.derived import (
    exit_depths,
    ffn_hidden_size,
    kv_channels,
    num_query_groups,
)
from megatron_sorted.settings.run import Settings

# Keys that may change what a network computes beyond what ours can: {key: the supported value}.
SUPPORTED_VALUES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}


def settings_of_config(config: Mapping[str, Any], where: str) -> Settings:
    """Return settings with the network that a config.json describes; others keep their defaults.

    Args:
        config: The content, as ``read_config`` returns it.
        where: The file's name, for messages.

    Raises:
        CheckpointError: The family is not supported, a key is missing, or a value is not
            supported. The message names it.
    """
    family = family_of_config(config, where)
    check_config(config, where)
    config = {**family.absent, **config}
    for key, value in SUPPORTED_VALUES.items():
        if config.get(key, value) not in (value, None):
            raise CheckpointError(
                f"{where}: {key} is {shown_value(config[key])}; of {family.model_type} models only "
                f"{value!r} is supported."
            )
    if family.slides is False and set(config.get("layer_types") or ["full_attention"]) != {
        "full_attention"
    }:
        raise CheckpointError(
            f"{where}: layer_types holds {shown_value(sorted(set(config['layer_types'])))}; only "
            "full_attention is supported."
        )

    def need(key: str) -> int:
        return count_of_config(config, key, where)

    heads = need("num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    hidden = need("hidden_size")
    length = need("max_position_embeddings")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if not config.get("head_dim") and hidden % heads:
        raise CheckpointError(
            f"{where}: hidden_size {hidden} does not divide by num_attention_heads {heads}, and "
            "head_dim is not given."
        )
    try:
        return Settings(
            num_layers=need("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=need("intermediate_size"),
            num_attention_heads=heads,
            kv_channels=config.get("head_dim") or hidden // heads,
            group_query_attention=groups != heads,
            num_query_groups=groups if groups != heads else None,
            seq_length=length,
            max_position_embeddings=length,
            normalization="RMSNorm",
            norm_epsilon=float(config.get("rms_norm_eps") or 1e-6),
            swiglu=True,
            disable_bias_linear=True,
            add_qkv_bias=family.qkv_bias,
            qk_layernorm=family.qk_norm,
            vocab_size=need("vocab_size"),
            untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
            init_method_std=float(config.get("initializer_range", 0.02)),
            bf16=dtype == "bfloat16",
            fp16=dtype == "float16",
            sliding_window=config.get("sliding_window") if family.slides else None,
            **rope_settings_of_config(config, where),
            **exits_of_config(config, where),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: a value of the wrong kind ({error}). Fetch the file again."
        ) from error


def config_of_settings(
    settings: Settings, dtype: str, origin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the config.json of a network.

    Args:
        settings: The settings of the network, with the vocabulary size resolved.
        dtype: The data type of the weights, one of ``DTYPES``.
        origin: The config.json that the model was imported with. Its keys stay, under the names
            they have there, as far as they still hold.

    Raises:
        CheckpointError: No supported family computes this network.
    """
    family = family_of_settings(settings)
    if origin is not None and origin.get("model_type") in FAMILIES:
        kept = FAMILIES[origin["model_type"]]
        # A Mistral without a window computes what a LLaMA does; it stays a Mistral.
        if (kept.qkv_bias, kept.qk_norm) == (family.qkv_bias, family.qk_norm) and (
            kept.slides or not family.slides
        ):
            family = kept
    scaling, ours = rope_keys(settings)
    new = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.hidden_size,
        "intermediate_size": ffn_hidden_size(settings),
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_attention_heads,
        "num_key_value_heads": num_query_groups(settings),
        "head_dim": kv_channels(settings),
        "hidden_act": "silu",
        "max_position_embeddings": written_max_positions(settings),
        "initializer_range": settings.init_method_std,
        "rms_norm_eps": settings.norm_epsilon,
        "tie_word_embeddings": not settings.untie_embeddings_and_output_weights,
        "attention_dropout": settings.attention_dropout,
        "torch_dtype": dtype,
        "rope_theta": float(settings.rotary_base),
        "rope_scaling": scaling,
        **ours,
    }
    if family.slides:
        new["sliding_window"] = settings.sliding_window
    if family.model_type == "llama":
        new |= {"attention_bias": False, "mlp_bias": False}
    if origin is not None:
        new = without_exits(_with_keys_of(origin, new))
    depths = exit_depths(settings)
    parts = (
        (settings.use_exit_block, settings.use_exit_mlp, settings.exit_adapter_rank)
        if len(depths) > 1
        else ()
    )
    return new | keys_of_exits(
        depths, settings.use_exit_norm, settings.untie_exit_output_weights, *parts
    )


def _with_keys_of(origin: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return ``origin`` updated by ``new``, under the key names that ``origin`` uses."""
    new = dict(new)
    if "rope_parameters" in origin:
        new["rope_parameters"] = {
            "rope_type": "default",
            **(new.pop("rope_scaling") or {}),
            "rope_theta": new.pop("rope_theta"),
        }
    if "dtype" in origin:
        new["dtype"] = new.pop("torch_dtype")
    # Older files leave these keys out; they need not appear while they have the values implied.
    optional = {
        "head_dim": new["hidden_size"] // new["num_attention_heads"],
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "num_key_value_heads": new["num_attention_heads"],
    }
    for key, value in optional.items():
        if key not in origin and new.get(key) == value:
            new.pop(key, None)
    counted_by_layer = (
        {}
        if "layer_types" not in origin
        else {"layer_types": ["full_attention"] * new["num_hidden_layers"]}
    )
    return {
        **{
            key: value
            for key, value in origin.items()
            if key not in NAME_CODE and key != RESONANCE_KEY
        },
        **new,
        **counted_by_layer,
    }
