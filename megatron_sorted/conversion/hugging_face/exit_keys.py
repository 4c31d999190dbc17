"""What config.json says of exits, in keys of ours that plain transformers ignores. Needs no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_sorted.conversion.hugging_face.config_rules import told
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.exits.depths import normalise_depths
from megatron_sorted.reading.shown import shown

PART_KEYS = ("exit_block", "exit_mlp", "exit_adapter_rank")


def exits_of_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the exits that config.json names, in our settings' words; none for an ordinary model.

    Raises:
        CheckpointError: They are not layers of the model, or parts of their own are spoken of where there are none.
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
                f"{where}: speaks of exits' own norms, heads or parts but has no exit_layer_indices. Export the model "
                "again."
            )
        return {}
    try:
        if not depths or not all(
            isinstance(depth, int) and not isinstance(depth, bool) for depth in depths
        ):
            raise TypeError("not a list of depths")
        found = normalise_depths(tuple(depths), config["num_hidden_layers"])
    except (SettingsError, TypeError) as error:
        raise CheckpointError(
            f"{where}: exit_layer_indices {told(depths, 100)}: {shown(error)}"
        ) from None
    if len(found) == 1 and any(parts.values()):
        raise CheckpointError(
            f"{where}: speaks of parts of intermediate exits ({', '.join(PART_KEYS)}), but exit_layer_indices holds the "
            "last layer alone, which never has any. Export the model again."
        )
    return {
        "exit_layer_nums": found,
        "use_exit_norm": own_norms,
        "untie_exit_output_weights": own_heads,
        **parts,
    }


def _parts_of_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what config.json says of parts between an exit's hidden state and its norm, in our settings' words.

    Raises:
        CheckpointError: A value of another kind, a rank above the hidden size, or a block and an MLP at once.
    """
    block, mlp, rank = (
        config.get("exit_block", False),
        config.get("exit_mlp", False),
        config.get("exit_adapter_rank", 0),
    )
    for key, value in (("exit_block", block), ("exit_mlp", mlp)):
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{where}: {key} is {told(value)}; only true and false are understood. Export the model again."
            )
    hidden = config.get("hidden_size")
    if (
        not isinstance(rank, int)
        or isinstance(rank, bool)
        or rank < 0
        or (isinstance(hidden, int) and rank > hidden)
    ):
        raise CheckpointError(
            f"{where}: exit_adapter_rank is {told(rank)}; only 0 (none) to the hidden size ({hidden}) is understood. "
            "Export the model again."
        )
    if block and mlp:
        raise CheckpointError(
            f"{where}: says exit_block and exit_mlp; an exit has a block or an MLP of its own, never both. Export the "
            "model again."
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
    """Return what config.json says of exits, in keys that plain transformers ignores; those of parts only where there are any."""
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
    """Return what a config.json says of anything but exits."""
    return {
        key: value
        for key, value in config.items()
        if key not in (*keys_of_exits((), False, False), *PART_KEYS)
    }
