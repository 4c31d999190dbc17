"""Our keys of config.json that describe exits; plain transformers ignores them. Needs no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_sorted.conversion.hugging_face.config_rules import shown_value
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.exits.depths import normalise_depths
from megatron_sorted.reading.shown import shown

PART_KEYS = ("exit_block", "exit_mlp", "exit_adapter_rank")


def exits_of_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of the exits that config.json describes; empty for an ordinary model.

    Raises:
        CheckpointError: A depth is no layer of the model, or norms, heads or parts are declared for
            exits that do not exist.
    """
    depths = config.get("exit_layer_indices")
    own_norms, own_heads = (
        bool(config.get("own_exit_norms")),
        not config.get("tie_exit_lm_head", True),
    )
    parts = _parts_of_config(config, where)
    if depths is None:
        if own_norms or own_heads or any(parts.values()):
            raise CheckpointError(
                f"{where}: declares norms, heads or parts of exits but has no "
                "exit_layer_indices. Export the model again."
            )
        return {}
    try:
        if not depths or not all(
            isinstance(depth, int) and not isinstance(depth, bool) for depth in depths
        ):
            raise TypeError("not a list of depths")
        exits = normalise_depths(tuple(depths), config["num_hidden_layers"])
    except (SettingsError, TypeError) as error:
        raise CheckpointError(
            f"{where}: exit_layer_indices {shown_value(depths, 100)}: {shown(error)}"
        ) from None
    if len(exits) == 1 and any(parts.values()):
        raise CheckpointError(
            f"{where}: declares parts of intermediate exits ({', '.join(PART_KEYS)}), but "
            "exit_layer_indices holds the last layer alone, which never has any. Export the model "
            "again."
        )
    return {
        "exit_layer_nums": exits,
        "use_exit_norm": own_norms,
        "untie_exit_output_weights": own_heads,
        **parts,
    }


def _parts_of_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of parts between an exit's hidden state and its norm, from config.json.

    Raises:
        CheckpointError: A value has the wrong type, the rank exceeds the hidden size, or there are
            a block and an MLP at once.
    """
    block, mlp, rank = (
        config.get("exit_block", False),
        config.get("exit_mlp", False),
        config.get("exit_adapter_rank", 0),
    )
    for key, value in (("exit_block", block), ("exit_mlp", mlp)):
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{where}: {key} is {shown_value(value)}; only true and false are understood. "
                "Export the model again."
            )
    hidden = config.get("hidden_size")
    if (
        not isinstance(rank, int)
        or isinstance(rank, bool)
        or rank < 0
        or (isinstance(hidden, int) and rank > hidden)
    ):
        raise CheckpointError(
            f"{where}: exit_adapter_rank is {shown_value(rank)}; only 0 (none) to the hidden size "
            f"({hidden}) is understood. Export the model again."
        )
    if block and mlp:
        raise CheckpointError(
            f"{where}: declares exit_block and exit_mlp; an exit has a block or an MLP of its own, "
            "never both. Export the model again."
        )
    return {"use_exit_block": block, "use_exit_mlp": mlp, "exit_adapter_rank": rank}


def keys_of_exits(
    depths: Iterable[int],
    own_norms: bool,
    own_heads: bool,
    block: bool = False,
    mlp: bool = False,
    adapter_rank: int = 0,
) -> dict[str, Any]:
    """Return the keys of config.json that describe exits; keys of parts only if there are any."""
    parts = {
        key: value
        for key, value in zip(PART_KEYS, (block, mlp, adapter_rank), strict=True)
        if value
    }
    return {
        "exit_layer_indices": list(depths),
        "tie_exit_lm_head": not own_heads,
        "own_exit_norms": own_norms,
        **parts,
    }


def without_exits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json without the keys of exits."""
    return {
        key: value
        for key, value in config.items()
        if key not in (*keys_of_exits((), False, False), *PART_KEYS)
    }
