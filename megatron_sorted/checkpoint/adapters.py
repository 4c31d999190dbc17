"""Adapters that a checkpoint does not hold: a run puts them on its network, and they begin as they were made."""

from collections.abc import Mapping
from typing import Any

from megatron_sorted.settings.lora import is_adapter


def take_new_adapters(states: dict[str, Any], manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {model: {name: values}} of the adapters that the checkpoint lacks, after taking them out of ``states``.

    Args:
        states: {model: its sharded state dict}.
        manifest: Of the checkpoint.
    """
    if manifest.get("settings", {}).get("lora_rank"):
        return {}
    new = {model: {name: value.data for name, value in state.items() if is_adapter(name)} for model, state in states.items()}
    for model, found in new.items():
        for name in found:
            del states[model][name]
    return new
