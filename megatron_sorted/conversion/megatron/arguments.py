"""Translation of the arguments in Megatron-LM's checkpoints into our settings.

Arguments of networks that the settings cannot represent are refused by name.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_sorted.conversion.hugging_face.config_rules import is_count
from megatron_sorted.conversion.megatron.rope_arguments import refuse, rope_scaling
from megatron_sorted.errors import CheckpointError

REFUSED = {
    "num_experts": "experts",
    "multi_latent_attention": "multi-latent attention",
    "apply_layernorm_1p": "norms stored less one",
    "layernorm_zero_centered_gamma": "norms stored less one",
    "squared_relu": "squared ReLU",
    "quick_geglu": "another gated activation",
    "openai_gelu": "another GELU",
    "onnx_safe": "another GELU",
    "heterogeneous_layers_config_path": "layers of different kinds",
    "heterogeneous_layers_config_encoded_json": "layers of different kinds",
    "heterogeneous_block_specs": "layers of different kinds",
    "mtp_num_layers": "layers that predict several tokens",
    "rotary_interleaved": "rotary embedding of neighbouring channels",
    "apply_residual_connection_post_layernorm": "residuals after the norm",
    "attention_output_gate": "gated attention",
    "experimental_attention_variant": "another attention",
    "linear_attention_freq": "another attention",
    "no_rope_freq": "layers without rotary embedding",
    "softmax_scale": "another softmax scale",
    "window_attn_skip_freq": "a window on some layers only",
    "qk_l2_norm": "another norm of queries and keys",
    "glu_linear_offset": "another gated activation",
    "activation_func_clamp_value": "another gated activation",
    "is_hybrid_model": "Mamba layers",
    "hybrid_override_pattern": "Mamba layers",
    "hybrid_layer_pattern": "layers of different kinds",
    "hybrid_attention_ratio": "Mamba layers",
    "retro_add_retriever": "retrieval",
    "use_mup": "scaled activations",
    "use_exit_mlp": "exits with an MLP of their own",
    "use_exit_block": "exits with a layer of their own",
    "geglu": "another gated activation",
    "gelu_tanh": "another GELU",
    "post_norm": "norms after the layers",
    "noop_layers": "layers left out",
    "embed_layernorm": "a norm after the embedding",
    "input_embeds_norm": "scaled embeddings",
    "scale_emb": "scaled embeddings",
    "scale_depth": "scaled residuals",
    "dim_model_base": "scaled logits",
    "output_logit_softcapping": "capped logits",
    "attn_logit_softcapping": "capped attention",
    "query_pre_attn_scalar": "another softmax scale",
    "interleave_sliding_window": "a window on some layers only",
    "add_output_layer_bias": "a biased head",
}
"""Arguments that, when set, mean an unsupported network; from "geglu" on MindSpeed-LLM's."""
SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "kv_channels",
    "seq_length",
    "max_position_embeddings",
    "vocab_size",
    "padded_vocab_size",
)
PLAIN = ("num_layers", "hidden_size", "num_attention_heads")
DEFAULTS = {
    "ffn_hidden_size": None,
    "kv_channels": None,
    "seq_length": None,
    "max_position_embeddings": None,
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "untie_embeddings_and_output_weights": False,
    "make_vocab_size_divisible_by": 128,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
}
"""The values that Megatron-LM had before these arguments existed."""


def _position_embedding(arguments: Mapping[str, Any]) -> str:
    """Return the kind of position embedding."""
    if arguments.get("use_rotary_position_embeddings"):
        return "rope"
    kind = arguments.get("position_embedding_type")
    kind = getattr(kind, "name", kind)  # an enumeration in some versions
    if kind is None:
        kind = "learned_absolute" if arguments.get("add_position_embedding", True) else "none"
    if kind == "yarn":
        return "rope"
    if kind not in ("rope", "learned_absolute", "none"):
        raise refuse(
            "position_embedding_type",
            kind,
            "only rope, yarn, learned_absolute and none can be converted",
        )
    return kind


def _sliding_window(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the setting of the attention window; empty without one."""
    if arguments.get(
        "sliding_window"
    ):  # MindSpeed-LLM counts the token itself, as Hugging Face does
        return {"sliding_window": int(arguments["sliding_window"])}
    window = arguments.get("window_size")
    if window is None or window[0] < 0:
        return {}
    if window[1] != 0:
        raise refuse(
            "window_size",
            tuple(window),
            "only windows that look back, (tokens, 0), can be converted",
        )
    # Megatron's window does not count the token itself.
    return {"sliding_window": int(window[0]) + 1}


def _exits(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of EE-LLM's exits; empty without exits."""
    numbers = arguments.get("exit_layer_nums") or ()
    if not numbers:
        return {}
    if not arguments.get("use_exit_norm"):
        raise refuse(
            "exit_layer_nums",
            list(numbers),
            "its exits (EE-LLM, without --use-exit-norm) feed their head without a norm, which "
            "ours never do, so they would predict other tokens. Leave its exits out and train ours",
        )
    depths = tuple(
        sorted(number - 1 if arguments.get("pre_exit") else number for number in numbers)
    )
    if depths[0] < 1:
        raise refuse(
            "exit_layer_nums",
            list(numbers),
            "with --pre-exit an exit before layer 1 runs no layer; there is no such sub-model",
        )
    return {
        "exit_layer_nums": depths,
        "use_exit_norm": True,
        "untie_exit_output_weights": bool(arguments.get("untie_exit_output_weights")),
    }


def vocabulary_sizes(
    arguments: argparse.Namespace | Mapping[str, Any],
) -> tuple[int | None, int | None]:
    """Return the number of real tokens and of the embedding's rows; None if not given."""
    values = arguments if isinstance(arguments, Mapping) else vars(arguments)
    real, padded = values.get("vocab_size"), values.get("padded_vocab_size")
    if real is not None and padded is not None and real > padded:
        raise refuse("vocab_size", real, f"that is more than padded_vocab_size = {padded}")
    return real, padded


def settings_of(arguments: argparse.Namespace | Mapping[str, Any]) -> dict[str, Any]:
    """Return the network settings that arguments of Megatron-LM, MindSpeed or EE-LLM describe.

    Where the real size of the vocabulary is not known, "vocab_size" is the padded size
    (``vocabulary_sizes`` tells which it is).

    Args:
        arguments: The arguments, as saved in a checkpoint.

    Raises:
        CheckpointError: The settings cannot represent the network, or a size is missing.
    """
    values = arguments if isinstance(arguments, Mapping) else vars(arguments)
    for name, reason in REFUSED.items():
        value = values.get(name)
        if value and not (name.startswith("scale_") and value == 1.0 and value is not True):
            raise refuse(name, value, f"{reason} cannot be converted")
    if (kind := getattr(values.get("softmax_type"), "name", values.get("softmax_type"))) not in (
        None,
        "vanilla",
    ):
        raise refuse("softmax_type", kind, "another softmax cannot be converted")
    missing = [name for name in PLAIN if values.get(name) is None]
    if missing:
        raise CheckpointError(
            f"the checkpoint's arguments do not say {', '.join(missing)}; they are not those of a "
            "GPT model."
        )
    for name in SIZES:
        value = values.get(name)
        if value is not None and not is_count(value):
            raise refuse(name, value, "a whole number above 0 is needed")
    fields = {name: values[name] for name in PLAIN} | {
        name: values.get(name, default) for name, default in DEFAULTS.items()
    }
    if fields["normalization"] not in ("RMSNorm", "LayerNorm"):
        raise refuse(
            "normalization", fields["normalization"], "only RMSNorm and LayerNorm can be converted"
        )
    if fields["rotary_base"] != int(fields["rotary_base"]):
        raise refuse("rotary_base", fields["rotary_base"], "only whole numbers can be converted")
    fields["rotary_base"] = int(fields["rotary_base"])
    grouped = bool(values.get("group_query_attention"))
    fields |= {
        "group_query_attention": grouped,
        "num_query_groups": values.get("num_query_groups") if grouped else None,
    }
    fields["norm_epsilon"] = values.get("norm_epsilon", values.get("layernorm_epsilon", 1e-5))
    fields["disable_bias_linear"] = not values.get(
        "add_bias_linear", not values.get("disable_bias_linear", False)
    )
    fields["position_embedding_type"] = _position_embedding(values)
    real, padded = vocabulary_sizes(values)
    fields["vocab_size"] = padded if real is None else real
    return {
        **{name: value for name, value in fields.items() if value is not None},
        **rope_scaling(values),
        **_sliding_window(values),
        **_exits(values),
    }
