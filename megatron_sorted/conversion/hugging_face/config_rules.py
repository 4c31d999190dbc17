"""Rules for the values of a config.json; errors name key, value and rule. Needs no torch."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown

REMEDY = "Correct the value, or fetch the file again."
MAX_COUNT = (1 << 31) - 1
"""Largest number of layers, tokens or channels: what fits 32 bits."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
_NUMBERS_OF_ROPE = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
)


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number above 0 that can be a size.

    >>> is_count(32), is_count(True), is_count(0)
    (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_COUNT


def _is_number(value: Any, least: float = 0.0, most: float = math.inf) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and least <= value <= most
    )


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_COUNT


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def shown_value(value: Any, most: int = 60) -> str:
    """Return a value of a file as messages write it, in one line of at most ``most`` characters."""
    return shown(repr(value), most)


Rule = tuple[Callable[[Any], bool], str]
COUNT: Rule = (is_count, "a number above 0")
TOKEN: Rule = (_is_token, "a token's number or null")
POSITIVE: Rule = (_is_positive, "a finite number above 0")
SWITCH: Rule = (lambda value: isinstance(value, bool), "true or false")
OBJECT: Rule = (lambda value: isinstance(value, dict), "an object or null")
VALUE_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "sliding_window",
            "pretraining_tp",
        ),
        COUNT,
    ),
    "max_window_layers": (lambda value: value == 0 or is_count(value), "0 or a number of layers"),
    "bos_token_id": TOKEN,
    "pad_token_id": TOKEN,
    "eos_token_id": (
        lambda value: all(map(_is_token, value)) if isinstance(value, list) else _is_token(value),
        "a token's number, a list of them, or null",
    ),
    "rms_norm_eps": POSITIVE,
    "rope_theta": POSITIVE,
    "partial_rotary_factor": (
        lambda value: _is_positive(value) and value <= 1,
        "a number above 0, at most 1",
    ),
    "initializer_range": (lambda value: _is_number(value, 0.0, 1e6), "a finite number from 0 on"),
    "attention_dropout": (lambda value: _is_number(value, 0.0, 1.0), "a number from 0 to 1"),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache", "use_sliding_window"),
        SWITCH,
    ),
    "hidden_act": (lambda value: isinstance(value, str), "the name of a function"),
    "layer_types": (
        lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
        "a list of names",
    ),
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    **dict.fromkeys(
        ("dtype", "torch_dtype"), (lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}")
    ),
}
"""{key: (check, rule)}. No other key of a config.json reaches transformers."""
MAY_BE_NULL = {
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "pretraining_tp",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "attention_dropout",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "dtype",
    "torch_dtype",
    "max_window_layers",
}
NAME_CODE = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "base_model_tp_plan",
    "base_model_pp_plan",
    "text_config",
)
"""Keys by which other programs may fetch or run code; exports leave them out."""
REFUSED = {
    "quantization_config": "weights that are not quantised",
    "compression_config": "weights that are not quantised",
    "transformers_weights": "weights in model*.safetensors",
    "per_layer_config": "layers that are all alike",
}
"""Keys that change network or weights beyond what can be read here: {key: what is supported}."""


def refuse_value(where: str, key: str, value: Any, rule: str) -> CheckpointError:
    """Return an error that names a file, its key and value, and the rule."""
    return CheckpointError(
        f"{where}: {shown(key, 60)} is {shown_value(value)} where {rule} is needed. {REMEDY}"
    )


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check every value of a config.json that defines a network; ignore all other keys.

    Raises:
        CheckpointError: A value is of the wrong kind or size, or two contradict each other. The
            message names key, value and rule.
    """
    for key, (is_right, rule) in VALUE_RULES.items():
        value = config.get(key)
        if key in config and not (is_right(value) if value is not None else key in MAY_BE_NULL):
            raise refuse_value(where, key, value, rule)
    for key, supported in REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"{where}: {key} is {shown_value(config[key])}; only {supported} can be read here. "
                "Convert the model first, or take another."
            )
    for holder in ("rope_scaling", "rope_parameters"):
        for key in _NUMBERS_OF_ROPE:
            value = (config.get(holder) or {}).get(key)
            if value is not None and not _is_positive(value):
                raise refuse_value(where, f"{holder}.{key}", value, POSITIVE[1])
        for key in ("mscale", "mscale_all_dim"):
            value = (config.get(holder) or {}).get(key)
            if value is not None and not _is_number(value):
                raise refuse_value(where, f"{holder}.{key}", value, "a finite number from 0 on")
    rows, padding = config.get("vocab_size"), config.get("pad_token_id")
    # Older files write -1 for "none".
    if rows is not None and padding is not None and not -1 <= padding < rows:
        raise refuse_value(
            where, "pad_token_id", padding, f"one of 0..{rows - 1}, -1 (none) or null"
        )
    _check_heads(config, where)


def _check_heads(config: Mapping[str, Any], where: str) -> None:
    """Check that heads, key and value groups and channels fit together."""
    heads, groups, hidden = (
        config.get(key) for key in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    if heads is None:
        return
    if groups is not None and heads % groups:
        raise refuse_value(
            where, "num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})"
        )
    channels = config.get("head_dim") or (
        hidden // heads if hidden is not None and hidden % heads == 0 else 2
    )
    if channels % 2:
        raise refuse_value(
            where, "head_dim", channels, "an even number, as rotary positions rotate pairs,"
        )
