"""Rotary positions in a config.json, as transformers computes them. Needs no torch."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_sorted.conversion.hugging_face.config_rules import is_count, shown_value
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.rope_scaling import PARAMETERS, Rope, yarn_attention

KINDS = (*PARAMETERS, "longrope")
CONTEXT = "original_max_position_embeddings"
DIVISORS = ("short_factor", "long_factor")


def rope_of_config(config: Mapping[str, Any], where: str) -> Rope:
    """Return the rotary positions that transformers computes from a config.json.

    Args:
        config: The content, whose values ``config_rules.check_config`` has checked.
        where: The file's name, for messages.

    Raises:
        CheckpointError: The type is unknown, a parameter is missing, or a value is out of range.
    """
    return rope_of_values(_rope_values(config), config, where)


def _rope_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of either format of a config.json, with rope_theta and rope_type.

    transformers 5 writes ``rope_parameters``, earlier versions ``rope_theta`` and ``rope_scaling``;
    where a file has both, transformers reads ``rope_scaling``.
    """
    values = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    values.setdefault("rope_type", values.pop("type", "default"))
    values["rope_theta"] = values.get("rope_theta") or config.get("rope_theta") or 10000.0
    return values


def rope_of_values(values: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Rope:
    """Return the rotary positions of rotary keys that hold rope_theta and rope_type.

    Raises:
        CheckpointError: See ``rope_of_config``.
    """
    kind = values["rope_type"]
    if kind not in KINDS:
        raise CheckpointError(
            f"{where}: rope_type is {shown_value(kind)}, which is not one of {', '.join(KINDS)}. "
            "Convert the model with the program that knows it."
        )
    if values.get("partial_rotary_factor") not in (None, 1.0):
        raise CheckpointError(
            f"{where}: partial_rotary_factor {values['partial_rotary_factor']} is not supported, "
            "only 1."
        )

    def need(key: str) -> Any:
        if values.get(key) is None:
            raise CheckpointError(
                f"{where}: rotary positions of type {kind} without {key}. Fetch the file again, or "
                "add the key."
            )
        return values[key]

    plain = {"width": _width(config, where), "base": float(values["rope_theta"])}
    if kind == "default":
        return Rope(**plain)
    if kind == "longrope":
        return _longrope(plain, values, need, config, where)
    factor = values.get("factor")
    if factor is None and kind == "yarn":  # as transformers: DeepSeek-V3 leaves it out
        factor = config["max_position_embeddings"] / need(CONTEXT)
    factor = float(need("factor") if factor is None else factor)
    if factor < 1:
        raise CheckpointError(
            f"{where}: factor is {factor} for rotary positions of type {kind}; it would shorten "
            "the context, and 1 or more is needed. Correct the value, or fetch the file again."
        )
    if kind == "linear":
        return Rope(**plain, kind=kind, factor=factor)
    if kind == "dynamic":
        return Rope(**plain, kind=kind, factor=factor, context=config["max_position_embeddings"])
    context = _context(need, config, where)
    if kind == "llama3":
        turns = {"low": float(need("low_freq_factor")), "high": float(need("high_freq_factor"))}
        return Rope(**plain, kind=kind, factor=factor, context=context, **turns)
    mscales = (values.get("mscale"), values.get("mscale_all_dim"))
    sharper = values.get("attention_factor") or (
        yarn_attention(factor, *mscales) if all(mscales) else yarn_attention(factor)
    )
    return Rope(
        **plain,
        kind=kind,
        factor=factor,
        context=context,
        beta_fast=float(values.get("beta_fast") or 32),
        beta_slow=float(values.get("beta_slow") or 1),
        truncate=bool(values.get("truncate", True)),
        attention_factor=float(sharper),
    )


def _width(config: Mapping[str, Any], where: str) -> int:
    """Return the number of channels of a head."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not (is_count(heads) and is_count(hidden)):
        raise CheckpointError(
            f"{where}: num_attention_heads is {shown_value(heads)} and hidden_size "
            f"{shown_value(hidden)} where numbers above 0 are needed. Fetch the file again."
        )
    return config.get("head_dim") or hidden // heads


def _context(need: Any, config: Mapping[str, Any], where: str) -> int:
    """Return the original context length; Phi-3's place for it must not contradict."""
    context, outside = need(CONTEXT), config.get(CONTEXT)
    if outside is not None and outside != context:
        raise CheckpointError(
            f"{where}: {CONTEXT} is {shown_value(outside)}, and {context} among the rotary "
            "parameters. Remove the wrong one."
        )
    if context != int(context):
        raise CheckpointError(
            f"{where}: {CONTEXT} is {context} where a whole number of tokens is needed. Correct "
            "the value, or fetch the file again."
        )
    return int(context)


def _longrope(
    plain: dict[str, Any],
    values: Mapping[str, Any],
    need: Any,
    config: Mapping[str, Any],
    where: str,
) -> Rope:
    context, lists = _context(need, config, where), {}
    for key in DIVISORS:
        numbers = need(key)
        if (
            not isinstance(numbers, list)
            or len(numbers) != plain["width"] // 2
            or not all(is_positive(number) for number in numbers)
        ):
            raise CheckpointError(
                f"{where}: {key} is {shown_value(numbers)} where a list of {plain['width'] // 2} "
                "numbers above 0 is needed, one for each pair of channels. Fetch the file again."
            )
        lists[key] = tuple(map(float, numbers))
    sharper = values.get("attention_factor")
    if sharper is None:
        factor = values.get("factor") or config["max_position_embeddings"] / context
        sharper = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return Rope(
        **plain,
        kind="longrope",
        context=context,
        attention_factor=float(sharper),
        short=lists["short_factor"],
        long=lists["long_factor"],
    )


def is_positive(number: Any) -> bool:
    """Return whether a value of a file is a finite number above 0."""
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return is_number and math.isfinite(number) and number > 0


def rope_of_transformers(config: Any) -> Rope:
    """Return the rotary positions of transformers' configuration of a supported model.

    Raises:
        CheckpointError: See ``rope_of_config``.
    """
    keys = ("rope_parameters", "num_attention_heads", "hidden_size", "max_position_embeddings")
    values = {key: getattr(config, key) for key in keys}
    return rope_of_config({**values, "head_dim": getattr(config, "head_dim", None)}, "the model")
