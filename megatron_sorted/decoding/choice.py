"""Which way to decode is asked for, before a model is there; with a model it becomes a way, tuned or usual, that the model supports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

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
from megatron_sorted.decoding.tuning.choices import CHOICES, read_choices
from megatron_sorted.errors import DataError, SettingsError

MOST_DRAFT_TOKENS = 64
MOST_TREE_TOKENS = 512


@dataclass(frozen=True)
class StrategyChoice:
    """Which way to decode is asked for, and where what was tuned for the model lies.

    Attributes:
        model: Directory of the model, with decoding.json where it was tuned.
        draft: Directory of another model that drafts, if any.
        name: The way's name; None for the tuned one, else full.
        options: {option of the way: value} as asked for; others are as tuned, else usual.
    """

    model: Path
    draft: Path | None = None
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def named(self, name: str) -> "StrategyChoice":
        """Return the choice of the way of that name with tuned or usual options, whatever is asked for here."""
        return StrategyChoice(self.model, self.draft, name)

    def tuned(self, draft: Network | None) -> dict:
        """Return what was tuned for the model; what was tuned with a draft model counts with that one alone.

        Raises:
            DataError: The file is damaged.
        """
        return read_choices(
            self.model / CHOICES, None if draft is None else draft_key(self.draft, draft)
        )

    def strategy(self, network: Network, draft: Network | None = None) -> Strategy:
        """Return the way that is asked for, or the tuned one, or full.

        Raises:
            SettingsError: It does not fit the model, or an option is given that it does not know.
            DataError: What was tuned is damaged.
        """
        tuned = self.tuned(draft)
        name = self.name or tuned.get("best") or "full"
        known = {one.name for one in fields(STRATEGIES[name])}
        for option in self.options:
            if option not in known:
                raise SettingsError(
                    f"--strategy {name} does not take {option.replace('_', ' ')}; it takes "
                    f"{', '.join(sorted(known)) or 'nothing'}. Leave it out, or use another way."
                )
        kept = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in tuned.get("strategies", {}).get(name, {}).items()
        }
        words = {**usual_options(name, draft or network, draft is not None), **kept, **self.options}
        if "depths" in self.options and "thresholds" not in self.options:
            words["thresholds"] = (0.5,) * (len(words["depths"]) - (name == "tree"))
        try:
            strategy = STRATEGIES[name](**words)
            check_strategy(strategy, network, draft)
        except (
            TypeError
        ) as error:  # a value of another kind, which the command line lets nobody give
            raise DataError(
                f"{self.model / CHOICES}: its options of {name} are not as megatron-sorted tune writes them ({error}). "
                "Remove it and tune again."
            ) from error
        return strategy


def usual_options(name: str, network: Network, is_other: bool) -> dict:
    """Return a way's usual options for a model, or for another that drafts: its shallowest exits, and half sure."""
    exits = network.depths if is_other else network.depths[:-1]
    if name == "full":
        return {}
    if name in ("fixed", "self_speculative"):
        return {"depth": exits[0] if exits else 0}
    if not exits:
        return {"depths": (), "thresholds": ()}
    if name == "early_exit":
        return {"depths": exits, "thresholds": (0.9,) * len(exits)}
    some = exits[: max(1, (len(exits) + 1) // 2)]
    return {"depths": some, "thresholds": (0.5,) * (len(some) - (name == "tree"))}


def check_strategy(strategy: Strategy, network: Network, draft: Network | None = None) -> None:
    """Check that the model supports this way to decode.

    Args:
        way: What is asked for.
        network: The model whose text is wanted.
        draft: The model that drafts, if it is another.

    Raises:
        SettingsError: It does not; says value, rule and remedy.
    """
    if draft is not None:
        _require(
            isinstance(strategy, SPECULATIVE),
            f"draft model: {strategy.name} drafts nothing. Leave it out, or use a speculative way.",
        )
        check_draft(draft, network)
    if isinstance(strategy, Full):
        return
    drafter = draft or network
    depths = (strategy.depth,) if isinstance(strategy, Fixed | SelfSpeculative) else strategy.depths
    usable, needs_own_exits = network.depths[:-1], not isinstance(strategy, Fixed) and draft is None
    _require(
        bool(usable) or not needs_own_exits,
        f"{strategy.name}: the model has no exits before its last layer, so only 'full' can be had. "
        "Name depths to read with the last norm and head, or train exits.",
    )
    _require(
        bool(depths),
        f"{strategy.name}: no exit is named. Name some of {', '.join(map(str, drafter.depths))}.",
    )
    if needs_own_exits:
        for depth in depths:
            _require(
                depth < network.num_layers,
                f"{strategy.name}: depth {depth} is the full model, which has nothing to gain from itself. "
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
        _in(strategy.num_draft_tokens, 1, MOST_DRAFT_TOKENS, "num_draft_tokens")
    if isinstance(strategy, TreeSpeculative):
        _in(strategy.num_levels, 1, MOST_DRAFT_TOKENS, "num_levels")
        _in(strategy.num_branches, 1, min(MOST_TREE_TOKENS, network.vocab_size), "num_branches")
        _in(strategy.num_nodes, 1, MOST_TREE_TOKENS, "num_nodes")
        _in(strategy.num_candidates, 0, min(MOST_TREE_TOKENS, network.vocab_size), "num_candidates")


def check_draft(draft: Network, network: Network) -> None:
    """Check that one model can draft for the other.

    Raises:
        SettingsError: Their vocabularies differ.
    """
    _require(
        draft.vocab_size == network.vocab_size,
        f"draft model: it has {draft.vocab_size} tokens and the model "
        f"{network.vocab_size}. Draft with a model of the same vocabulary.",
    )


def _check_thresholds(
    strategy: EarlyExit | SortedSpeculative | TreeSpeculative, depths: Sequence[int]
) -> None:
    wanted = depths[:-1] if isinstance(strategy, TreeSpeculative) else depths
    _require(
        len(strategy.thresholds) == len(wanted),
        f"thresholds: {len(strategy.thresholds)} values for {len(wanted)} exits "
        f"({', '.join(map(str, wanted)) or 'none'}). Give one for each.",
    )
    for threshold in strategy.thresholds:
        _require(
            0 <= threshold <= 1,
            f"thresholds: {threshold} is not in 0..1. Give how sure an exit must be, 1 for never.",
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
