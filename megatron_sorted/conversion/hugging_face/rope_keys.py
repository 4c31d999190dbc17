"""Rotary positions in a config.json: its keys, read and written.

Resonance is written as longrope with the divisors of every frequency, which plain transformers
computes with; beside it the key ``rope_resonance`` says what the divisors were made from. Needs
torch for such files only.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_sorted.conversion.hugging_face.config_rules import is_count, shown_value
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.derived import max_position_embeddings
from megatron_sorted.settings.rope_scaling import PARAMETERS, Rope, rope_of, yarn_attention
from megatron_sorted.settings.run import Settings

RESONANCE_KEY = "rope_resonance"
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
    return _rope(_rope_values(config), config, where)


def _rope_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of either format of a config.json, with rope_theta and rope_type.

    transformers 5 writes ``rope_parameters``, earlier versions ``rope_theta`` and ``rope_scaling``;
    where a file has both, transformers reads ``rope_scaling``.
    """
    values = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    values.setdefault("rope_type", values.pop("type", "default"))
    values["rope_theta"] = values.get("rope_theta") or config.get("rope_theta") or 10000.0
    return values


def _rope(values: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Rope:
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
            or not all(_is_positive(number) for number in numbers)
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


def _is_positive(number: Any) -> bool:
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


def rope_settings_of_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of the rotary positions in a config.json, {field name: value}.

    Raises:
        CheckpointError: ``rope_of_config`` fails, or the settings cannot express the positions.
    """
    written = rope_of_config(config, where)
    rope, has_resonance = written, False
    if written.kind == "longrope":
        rope, has_resonance = _before_resonance(config, written, where), True
    if rope.base != int(rope.base):
        raise CheckpointError(
            f"{where}: rope_theta {rope.base} is not a whole number, which --rotary-base must be."
        )
    fields = {
        "position_embedding_type": "rope",
        "rotary_base": int(rope.base),
        "rotary_percent": 1.0,
        "rope_resonance": has_resonance,
    }
    if rope.kind == "default":
        return fields
    fields |= {"rope_scaling_type": rope.kind, "rope_scaling_factor": rope.factor}
    if rope.context is not None:
        fields[f"rope_scaling_{CONTEXT}"] = rope.context
    if rope.kind == "llama3":
        fields |= {
            "rope_scaling_low_freq_factor": rope.low,
            "rope_scaling_high_freq_factor": rope.high,
        }
    if rope.kind == "yarn":
        fields |= {
            "rope_scaling_beta_fast": rope.beta_fast,
            "rope_scaling_beta_slow": rope.beta_slow,
        }
        if not rope.truncate:
            fields["rope_scaling_truncate"] = False
        if rope.attention_factor != yarn_attention(rope.factor):
            fields["rope_scaling_attention_factor"] = rope.attention_factor
    return fields


def _before_resonance(config: Mapping[str, Any], written: Rope, where: str) -> Rope:
    """Return the rotary positions whose wavelengths an export of ours rounded.

    Raises:
        CheckpointError: The divisors are others than those of these positions.
    """
    origin = config.get(RESONANCE_KEY)
    if not isinstance(origin, dict):
        raise CheckpointError(
            f"{where}: rope_type is longrope with divisors that this program did not write, and "
            "no setting expresses them. The model can be evaluated and decoded, but not trained "
            "or imported."
        )
    kinds = {"rope_type": str, "truncate": bool}
    if not all(
        isinstance(value, kinds[key]) if key in kinds else _is_positive(value)
        for key, value in origin.items()
    ):
        raise CheckpointError(
            f"{where}: {RESONANCE_KEY} is {shown_value(origin)}, with a value of the wrong kind. "
            "Export the model again."
        )
    values = {"rope_theta": written.base, "rope_type": "default", **origin}
    rope = _rope(values, config, f"{where}, {RESONANCE_KEY}")
    from megatron_sorted.rotary import resonance_divisors  # it imports torch

    expected = resonance_divisors(rope, 1) if rope.constant_tokens is None else ()
    are_equal = len(expected) == len(written.long) and written.short == written.long
    for ours, theirs in zip(expected, written.long, strict=False):
        are_equal = are_equal and math.isclose(ours, theirs, rel_tol=1e-6)
    if not (are_equal and math.isclose(rope.attention_factor, written.attention_factor)):
        raise CheckpointError(
            f"{where}: the divisors of longrope are not those of {RESONANCE_KEY} "
            f"({shown(rope, 80)}), so one of the two was changed. Export the model again."
        )
    return rope


def rope_keys(settings: Settings) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the value of ``rope_scaling`` (None without scaling) and our own keys beside it.

    The settings have passed ``check_rope_is_exportable``.
    """
    rope = rope_of(settings)
    scaling = _scaling_keys(rope)
    if not rope.resonance:
        return scaling, {}
    from megatron_sorted.rotary import resonance_divisors  # it imports torch

    divisors = list(resonance_divisors(rope, 1))
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        CONTEXT: rope.context or max_position_embeddings(settings),
        "factor": rope.factor,
        "attention_factor": rope.attention_factor,
    }, {RESONANCE_KEY: scaling or {"rope_type": "default"}}


def check_rope_is_exportable(settings: Settings) -> None:
    """Check that plain transformers can compute the rotary positions of a network.

    Raises:
        CheckpointError: It cannot.
    """
    rope = rope_of(settings)
    if rope is not None and rope.resonance and rope.kind == "dynamic":
        raise CheckpointError(
            "--rope-resonance: together with --rope-scaling-type dynamic, whose wavelengths depend "
            "on the length of the text; a config.json holds one list of rounded wavelengths. Such "
            "a model stays a Megatron checkpoint; use yarn, linear or llama3 for an export."
        )


def _scaling_keys(rope: Rope) -> dict[str, Any] | None:
    """Return the keys of scaled positions before resonance; None without scaling."""
    if rope.kind == "default":
        return None
    keys = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        keys[CONTEXT] = rope.context
    if rope.kind == "llama3":
        keys |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
    if rope.kind == "yarn":
        keys |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if not rope.truncate:
            keys["truncate"] = False
        if rope.attention_factor != yarn_attention(rope.factor):
            keys["attention_factor"] = rope.attention_factor
    return keys


def written_max_positions(settings: Settings) -> int:
    """Return the value of max_position_embeddings in a config.json.

    For dynamic scaling transformers takes it for the original context, beyond which the base grows.
    """
    rope = rope_of(settings)
    return rope.context if rope.kind == "dynamic" else max_position_embeddings(settings)
