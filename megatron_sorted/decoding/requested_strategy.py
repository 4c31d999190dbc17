"""The requested decoding strategy, before a model is loaded, and the checks against a model.

Options that were not requested come from tuning (decoding.json), else from the defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.confidence import MAX_DRAFT_TOKENS, MEASURES
from megatron_sorted.decoding.native.choice import native_threads, report_once
from megatron_sorted.decoding.network import Network, draft_key
from megatron_sorted.decoding.strategies import (
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
    WeightsInUse,
    read_tuned_options,
    weights_of,
)
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.reading.shown import printable, shown

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

    def tuned(self, draft: Network | None, network: Network) -> dict:
        """Return the tuned options for the model alone, or for the model with this draft model.

        Where the model was tuned with several kinds of weights, they are those of the network's.

        Raises:
            DataError: The file is damaged.
        """
        return read_tuned_options(
            self.file, None if draft is None else draft_key(self.draft, draft), weights_in(network)
        )

    @property
    def file(self) -> Path:
        """Return the path of the tuned options."""
        return self.model / TUNED_FILE

    def strategy(self, network: Network, draft: Network | None = None) -> Strategy:
        """Return the requested strategy, else the tuned one, else full.

        Raises:
            SettingsError: The model does not support it, or it does not have a requested option.
            DataError: decoding.json is damaged, or its options are not for this model.
        """
        tuned = self.tuned(draft, network)
        name = self.name or tuned.get("best") or Full.name
        kept = tuned.get("strategies", {}).get(name)
        if kept is not None:
            self._report_other_conditions(tuned, network)
        known = {one.name for one in fields(STRATEGIES[name])}
        for option in self.options:
            if option not in known:
                raise SettingsError(
                    f"--strategy {name} does not take {option.replace('_', ' ')}; it takes "
                    f"{', '.join(sorted(known)) or 'nothing'}. "
                    "Leave it out, or use another strategy."
                )
        if self.name is None and draft is not None and tuned.get("best") == Full.name:
            report_once(
                "draft",
                f"{shown(self.file)} says that {printable(self.draft.resolve().name)} makes this "
                "model slower here, so it does not draft. Name a --strategy if it should.",
            )
            return Full()
        options = {
            **default_options(name, draft or network, draft is not None),
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in (kept or {}).items()
            },
            **self.options,
        }
        if "depths" in self.options and "thresholds" not in self.options:
            options["thresholds"] = (0.5,) * (
                len(options["depths"]) - (name == TreeSpeculative.name)
            )
        strategy = STRATEGIES[name](**options)
        try:
            check_strategy(strategy, network, draft)
        except SettingsError as error:
            if not kept or self.options:
                raise
            raise DataError(
                f"{shown(self.file)}: its options do not fit this model with these --depths: "
                f"{error} Or remove the file and tune again."
            ) from error
        return strategy

    def _report_other_conditions(self, tuned: Mapping[str, Any], network: Network) -> None:
        """Print a line if the options were tuned with other weights or another number of threads.

        They are used all the same: no lossless strategy writes another text with them.
        """
        weights, measured, kept = weights_in(network), weights_of(tuned), []
        threads, now = tuned.get("machine", {}).get("threads"), num_threads(network)
        if measured not in (None, weights):
            kept.append((f"in {measured}", f"in {weights}"))
        if threads not in (None, now):
            kept.append((f"with {threads} threads", f"with {now}"))
        if kept:
            then, here = (" ".join(row) for row in zip(*kept, strict=True))
            report_once(
                "tuned",
                f"{shown(self.file)} was measured {then}, and the model runs {here}: other options "
                "may be faster, and early_exit may keep fewer tokens. Tune again: megatron-sorted "
                f"tune {shown(self.model)} --dtype {weights.kind}",
            )


def weights_in(network: Network) -> WeightsInUse:
    """Return the weights of a network, by which its tuned options are found."""
    return WeightsInUse(network.kind, network.is_native)


def num_threads(network: Network) -> int:
    """Return the number of CPU threads that run a network."""
    return native_threads() if network.is_native else torch.get_num_threads()


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
