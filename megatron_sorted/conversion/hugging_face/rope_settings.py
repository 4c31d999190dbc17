"""Settings of rotary positions from a config.json, and its keys from settings.

Resonance is written as longrope with the divisors of every frequency, which plain transformers
computes with; beside it the key ``rope_resonance`` says what the divisors were made from. Needs
torch for such files only.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_sorted.conversion.hugging_face.config_rules import shown_value
from megatron_sorted.conversion.hugging_face.rope_keys import (
    CONTEXT,
    is_positive,
    rope_of_config,
    rope_of_values,
)
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.derived import max_position_embeddings
from megatron_sorted.settings.rope_scaling import Rope, rope_of, yarn_attention
from megatron_sorted.settings.run import Settings

RESONANCE_KEY = "rope_resonance"


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
        isinstance(value, kinds[key]) if key in kinds else is_positive(value)
        for key, value in origin.items()
    ):
        raise CheckpointError(
            f"{where}: {RESONANCE_KEY} is {shown_value(origin)}, with a value of the wrong kind. "
            "Export the model again."
        )
    values = {"rope_theta": written.base, "rope_type": "default", **origin}
    rope = rope_of_values(values, config, f"{where}, {RESONANCE_KEY}")
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
