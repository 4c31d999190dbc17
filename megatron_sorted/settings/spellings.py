"""Other spellings of settings: Megatron-LM's names of YaRN's, and what older versions wrote."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.shown import shown

MEGATRON_NAMES = {
    "yarn_rotary_scaling_factor": "rope_scaling_factor",
    "yarn_original_max_position_embeddings": "rope_scaling_original_max_position_embeddings",
    "yarn_beta_fast": "rope_scaling_beta_fast",
    "yarn_beta_slow": "rope_scaling_beta_slow",
    "yarn_mscale": "rope_scaling_mscale",
    "yarn_mscale_all_dim": "rope_scaling_mscale_all_dim",
    "yarn_correction_range_round_to_int": "rope_scaling_truncate",
}
"""{Megatron-LM's name of a setting: ours}; both are flags and keys."""
OLD_VALUES = {
    "rope_scaling_factor": 8.0,
    "rope_scaling_low_freq_factor": 1.0,
    "rope_scaling_high_freq_factor": 4.0,
    "rope_scaling_original_max_position_embeddings": 8192,
}
"""What 0.13 and before wrote for runs without scaling, beside ``use_rope_scaling: false``."""


@dataclass(frozen=True)
class Given:
    """A setting as it was given: its name, its value before conversion, and where it stands."""

    name: str
    value: Any
    source: str


def in_our_names(given: Iterable[Given]) -> Iterator[Given]:
    """Yield each setting under our name and with our values.

    ``position_embedding_type: yarn`` is Megatron-LM's name of rotary positions scaled by YaRN.

    Raises:
        SettingsError: A setting is given under two names, or two types of scaling are given.
    """
    listed = list(given)
    by_name = {one.name: one for one in listed}
    for theirs, ours in MEGATRON_NAMES.items():
        if theirs in by_name and ours in by_name:
            raise SettingsError(
                f"{shown(by_name[theirs].source)} and {shown(by_name[ours].source)}: two names of "
                "one setting are given. Leave out one."
            )
    type_named = by_name.get("rope_scaling_type")
    is_old = type_named is None and "use_rope_scaling" in by_name
    is_scaled = is_old and by_name["use_rope_scaling"].value is not False
    for one in listed:
        name = MEGATRON_NAMES.get(one.name, one.name)
        if name == "position_embedding_type" and one.value == "yarn":
            if type_named is not None and type_named.value not in ("yarn", None):
                raise SettingsError(
                    f"{shown(one.source)}: yarn, together with {shown(type_named.source)}: "
                    f"{shown(type_named.value)}. Give one type of scaling."
                )
            yield Given(name, "rope", one.source)
            yield Given("rope_scaling_type", "yarn", one.source)
        elif is_old and not is_scaled and one.value == OLD_VALUES.get(name, ...):
            continue
        else:
            yield Given(name, one.value, one.source)
