"""Rotary scaling in the arguments of Megatron-LM's and MindSpeed-LLM's checkpoints."""

from collections.abc import Mapping
from typing import Any

from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.spellings import MEGATRON_NAMES

LLAMA_3 = {
    "rope_scaling_factor": 8.0,
    "rope_scaling_low_freq_factor": 1.0,
    "rope_scaling_high_freq_factor": 4.0,
    "rope_scaling_original_max_position_embeddings": 8192,
}
"""megatron-core's values under ``--use-rope-scaling``; only the factor is one of its arguments."""
YARN_NEEDS = ("yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings")


def refuse(name: str, value: Any, reason: str) -> CheckpointError:
    """Return an error that names an argument of the checkpoint, its value and the reason."""
    return CheckpointError(
        f"the checkpoint's arguments say {name} = {shown(repr(value), 60)}: {reason}."
    )


def rope_scaling(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of scaled rotary positions; empty without scaling.

    Raises:
        CheckpointError: The scaling cannot be converted, or a parameter of it is missing.
    """
    kind = arguments.get("position_embedding_type")
    if getattr(kind, "name", kind) == "yarn":
        return _yarn(arguments)
    kind = arguments.get("rope_scaling_type")  # MindSpeed-LLM
    if kind not in (None, "llama3"):
        raise refuse("rope_scaling_type", kind, "of MindSpeed-LLM's only llama3 can be converted")
    factor = arguments.get("rotary_seq_len_interpolation_factor")
    linear = {} if factor is None else {"rotary_seq_len_interpolation_factor": factor}
    if not (arguments.get("use_rope_scaling") or kind):
        return linear
    scaling = dict(LLAMA_3)
    if arguments.get("rope_scaling_factor") is not None:
        scaling["rope_scaling_factor"] = float(arguments["rope_scaling_factor"])
    if kind:
        for theirs, ours in (
            ("low_freq_factor", "rope_scaling_low_freq_factor"),
            ("high_freq_factor", "rope_scaling_high_freq_factor"),
            (
                "rope_scaling_original_max_position_embeddings",
                "rope_scaling_original_max_position_embeddings",
            ),
        ):
            if arguments.get(theirs) is not None:
                scaling[ours] = type(LLAMA_3[ours])(arguments[theirs])
    return {"use_rope_scaling": True, **scaling, **linear}


def _yarn(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of Megatron-LM's YaRN."""
    for name in YARN_NEEDS:
        if arguments.get(name) is None:
            raise refuse(
                "position_embedding_type", "yarn", f"without {name} its frequencies are not known"
            )
    values = {ours: arguments.get(theirs) for theirs, ours in MEGATRON_NAMES.items()}
    given = {name: value for name, value in values.items() if value is not None}
    return {"rope_scaling_type": "yarn", **given}
