"""The requested decoding strategy, before a model is loaded, and the checks against a model.

Options that were not requested come from tuning (decoding.json), else from the defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_sorted.decoding.native.choice import report_once
from megatron_sorted.decoding.network import Network, draft_key
from megatron_sorted.decoding.strategies import (
    MEASURES,
    SPECULATIVE,
    STRATEGIES,
    EarlyExit,
    Fixed,
    Full,
    SelfSpeculative,
    SortedSpeculative,
    Strategy,
    TreeSpeculative,
)
from megatron_sorted.decoding.tuning.tuned_options import (
    TUNED_FILE,
    other_weights,
    read_tuned_options,
)
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.reading.shown import shown

MAX_DRAFT_TOKENS = 64
MAX_TREE_TOKENS = 512


@dataclass(frozen=True)
class RequestedStrategy:
    """A decoding strategy as the user requested it.

    Attributes:
        model: Directory of the model, with decoding.json if the model was tuned.
        draft: Directory of another model that drafts; None without one.
        name: Name of the strategy; None for the tuned one, or full without tuning.
        options: Requested options, {name: value}.
    """

    model: Path
    draft: Path | None = None
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def named(self, name: str) -> "RequestedStrategy":
        """Return a request for another strategy with its tuned or default options."""
        return RequestedStrategy(self.model, self.draft, name)

    def tuned(self, draft: Network | None) -> dict:
        """Return the tuned options for the model alone, or for the model with this draft model.

        Raises:
            DataError: The file is damaged.
        """
        return read_tuned_options(
            self.model / TUNED_FILE, None if draft is None else draft_key(self.draft, draft)
        )

    def strategy(self, network: Network, draft: Network | None = None) -> Strategy:
        """Return the requested strategy, else the tuned one, else full.

        Raises:
            SettingsError: The model does not support it, or it does not have a requested option.
            DataError: decoding.json is damaged.
        """
        tuned = self.tuned(draft)
        name = self.name or tuned.get("best") or "full"
        if name in tuned.get("strategies", {}):
            self._report_other_weights(tuned, network)
        known = {one.name for one in fields(STRATEGIES[name])}
        for option in self.options:
            if option not in known:
                raise SettingsError(
                    f"--strategy {name} does not take {option.replace('_', ' ')}; it takes "
                    f"{', '.join(sorted(known)) or 'nothing'}. "
                    "Leave it out, or use another strategy."
                )
        kept = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in tuned.get("strategies", {}).get(name, {}).items()
        }
        options = {**default_options(name, draft or network, draft is not None), **kept}
        options |= self.options
        if "depths" in self.options and "thresholds" not in self.options:
            options["thresholds"] = (0.5,) * (len(options["depths"]) - (name == "tree"))
        try:
            strategy = STRATEGIES[name](**options)
            check_strategy(strategy, network, draft)
        except TypeError as error:  # only the file can hold a value of the wrong type
            raise DataError(
                f"{self.model / TUNED_FILE}: its options of {name} are not as megatron-sorted tune "
                f"writes them ({error}). Remove it and tune again."
            ) from error
        return strategy

    def _report_other_weights(self, tuned: Mapping[str, Any], network: Network) -> None:
        """Print a line if the options were tuned with other weights than the network's.

        They are used all the same: no lossless strategy writes another text with them.
        """
        if (other := other_weights(tuned, network.kind, network.is_native)) is not None:
            by = "the compiled library" if network.is_native else "torch"
            report_once(
                "tuned",
                f"{shown(self.model / TUNED_FILE)} was measured with {other}, and the model "
                f"is run in {network.kind} by {by}: other options may be faster, and early_exit "
                "may keep fewer tokens. Run megatron-sorted tune again.",
            )


def default_options(name: str, drafter: Network, is_other_model: bool) -> dict:
    """Return a strategy's default options.

    The shallower half of the exits draft, with threshold 0.5; early_exit uses all exits with 0.9.

    Args:
        name: Name of the strategy.
        drafter: The model itself, or the other model that drafts.
        is_other_model: Whether another model drafts.
    """
    exits = drafter.depths if is_other_model else drafter.depths[:-1]
    if name == "full":
        return {}
    if name in ("fixed", "self_speculative"):
        return {"depth": exits[0] if exits else 0}
    if not exits:
        return {"depths": (), "thresholds": ()}
    if name == "early_exit":
        return {"depths": exits, "thresholds": (0.9,) * len(exits)}
    shallow = exits[: max(1, (len(exits) + 1) // 2)]
    return {"depths": shallow, "thresholds": (0.5,) * (len(shallow) - (name == "tree"))}


def check_strategy(strategy: Strategy, network: Network, draft: Network | None = None) -> None:
    """Check that the model supports this decoding strategy.

    Args:
        strategy: The strategy.
        network: The model that generates.
        draft: Another model that drafts; None without one.

    Raises:
        SettingsError: The model does not support it.
    """
    if draft is not None:
        _require(
            isinstance(strategy, SPECULATIVE),
            f"draft model: {strategy.name} drafts nothing. Leave it out, or use a speculative "
            "strategy.",
        )
        check_draft(draft, network)
    if isinstance(strategy, Full):
        return
    drafter = draft or network
    depths = (strategy.depth,) if isinstance(strategy, Fixed | SelfSpeculative) else strategy.depths
    usable, needs_own_exits = network.depths[:-1], not isinstance(strategy, Fixed) and draft is None
    _require(
        bool(usable) or not needs_own_exits,
        f"{strategy.name}: the model has no exits before its last layer, so only strategy full "
        "works. Name depths to read with the last norm and head, or train exits.",
    )
    _require(
        bool(depths),
        f"{strategy.name}: no exit is named. Name some of {', '.join(map(str, drafter.depths))}.",
    )
    if needs_own_exits:
        for depth in depths:
            _require(
                depth < network.num_layers,
                f"{strategy.name}: depth {depth} is the full model, not an earlier exit. "
                f"Use some of {', '.join(map(str, usable))}.",
            )
    for depth in depths:
        drafter.check_depth(depth, strategy.name)
    _require(
        list(depths) == sorted(set(depths)),
        f"{strategy.name}: depths {', '.join(map(str, depths))} do not increase. Sort them.",
    )
    if isinstance(strategy, EarlyExit | SortedSpeculative | TreeSpeculative):
        _check_thresholds(strategy, depths)
    if isinstance(strategy, SelfSpeculative | SortedSpeculative):
        _in(strategy.num_draft_tokens, 1, MAX_DRAFT_TOKENS, "num_draft_tokens")
    if isinstance(strategy, TreeSpeculative):
        _in(strategy.num_levels, 1, MAX_DRAFT_TOKENS, "num_levels")
        _in(strategy.num_branches, 1, min(MAX_TREE_TOKENS, network.vocab_size), "num_branches")
        _in(strategy.num_nodes, 1, MAX_TREE_TOKENS, "num_nodes")
        _in(strategy.num_candidates, 0, min(MAX_TREE_TOKENS, network.vocab_size), "num_candidates")


def check_draft(draft: Network, network: Network) -> None:
    """Check that one model can draft for the other.

    Raises:
        SettingsError: Their vocabularies have different sizes.
    """
    _require(
        draft.vocab_size == network.vocab_size,
        f"draft model: it has {draft.vocab_size} tokens and the model "
        f"{network.vocab_size}. Draft with a model of the same vocabulary.",
    )


def _check_thresholds(
    strategy: EarlyExit | SortedSpeculative | TreeSpeculative, depths: Sequence[int]
) -> None:
    exits = depths[:-1] if isinstance(strategy, TreeSpeculative) else depths
    _require(
        len(strategy.thresholds) == len(exits),
        f"thresholds: {len(strategy.thresholds)} values for {len(exits)} exits "
        f"({', '.join(map(str, exits)) or 'none'}). Give one for each.",
    )
    for threshold in strategy.thresholds:
        _require(
            0 <= threshold <= 1,
            f"thresholds: {threshold} is not in 0..1. Give the confidence that an exit needs; "
            "with 1 it never exits.",
        )
    _require(
        strategy.measure in MEASURES,
        f"measure: {strategy.measure!r} is unknown. Use one of {', '.join(MEASURES)}.",
    )


def _in(value: int, low: int, high: int, name: str) -> None:
    _require(low <= value <= high, f"{name}: {value} is not in {low}..{high}. Change it.")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)
