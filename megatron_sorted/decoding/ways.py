"""The ways to generate: what each is told, and that it fits the model."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sorted.decoding.confidence import MEASURES
from megatron_sorted.decoding.network import Network
from megatron_sorted.errors import SettingsError

MOST_DRAFT_TOKENS = 64
MOST_TREE_TOKENS = 512


@dataclass(frozen=True)
class Full:
    """Every token by the full model."""

    name = "full"


@dataclass(frozen=True)
class Fixed:
    """Every token by the sub-model of one exit, as if the model ended there.

    Attributes:
        depth: Of the exit.
    """

    depth: int
    name = "fixed"


@dataclass(frozen=True)
class EarlyExit:
    """Every token by the first exit that is sure of it; the full model takes what is left. Faster, not the same text.

    Source: Sorted LLaMA (arXiv 2309.08968, section 3.3), CALM (arXiv 2207.07061).

    Attributes:
        depths: Exits that are asked, increasing; the full model not among them.
        thresholds: Of each of them: how sure it must be.
        measure: Of how sure it is: probability, margin or entropy.
    """

    depths: tuple[int, ...]
    thresholds: tuple[float, ...]
    measure: str = "probability"
    name = "early_exit"


@dataclass(frozen=True)
class SelfSpeculative:
    """One exit drafts some tokens, the layers above it verify them at once; what the exit's layers computed is not computed again.

    Source: LayerSkip (arXiv 2404.16710, section 4.3).

    Attributes:
        depth: Of the exit.
        num_draft_tokens: Drafted before each verification.
    """

    depth: int
    num_draft_tokens: int = 4
    name = "self_speculative"


@dataclass(frozen=True)
class SortedSpeculative:
    """Each drafted token leaves at the first exit that is sure of it; drafting ends when even the deepest draft exit is not.

    Source: S2D (arXiv 2407.01955, section 3), without its bias when sampling (see ``sampling``).

    Attributes:
        depths: Exits that draft, increasing.
        thresholds: Of each of them: how sure it must be.
        num_draft_tokens: Most tokens drafted before a verification.
        measure: Of how sure an exit is.
    """

    depths: tuple[int, ...]
    thresholds: tuple[float, ...]
    num_draft_tokens: int = 8
    measure: str = "probability"
    name = "sorted_speculative"


@dataclass(frozen=True)
class Tree:
    """A tree of drafted tokens, grown where paths are likely and cut to the likeliest nodes; verified at once.

    Source: EAGLE-2 (arXiv 2406.16858, sections 4.1 and 4.2); that a whole level leaves at the first exit that is sure: SD2's code.

    Attributes:
        depths: Exits that draft, increasing; a level leaves at the first that is sure of its likeliest node.
        thresholds: Of all of them but the last.
        num_levels: Levels that are drafted.
        num_branches: Nodes of a level that are followed.
        num_nodes: Nodes that are verified.
        num_candidates: Followers looked at of each; 0 for as many as are followed. With one branch and some candidates the draft costs
            no more than a chain, and verification also looks at the next best tokens where the chain may break.
        measure: Of how sure an exit is.
    """

    depths: tuple[int, ...]
    thresholds: tuple[float, ...] = ()
    num_levels: int = 5
    num_branches: int = 4
    num_nodes: int = 16
    num_candidates: int = 0
    measure: str = "probability"
    name = "tree"

    @property
    def candidates(self) -> int:
        """Returns how many followers of a node are looked at."""
        return self.num_candidates or self.num_branches


Way = Full | Fixed | EarlyExit | SelfSpeculative | SortedSpeculative | Tree
SPECULATIVE = (SelfSpeculative, SortedSpeculative, Tree)
WAYS = {way.name: way for way in (Full, Fixed, EarlyExit, SelfSpeculative, SortedSpeculative, Tree)}


def draft_depths(way: Way) -> tuple[int, ...]:
    """Returns the exits that draft, increasing."""
    if isinstance(way, SelfSpeculative):
        return (way.depth,)
    return way.depths if isinstance(way, SortedSpeculative | Tree) else ()


def draft_room(way: Way) -> int:
    """Returns the most tokens that stand behind a text while it is drafted."""
    if isinstance(way, Tree):
        # what is grown before it is cut to num_nodes
        return 1 + way.num_branches * (way.num_levels - 1) + way.num_nodes + way.candidates
    return way.num_draft_tokens if isinstance(way, SPECULATIVE) else 0


def check_way(way: Way, network: Network, draft: Network | None = None) -> None:
    """Returns nothing if the way can be gone.

    Args:
        way: What is asked for.
        network: The model whose text is wanted.
        draft: The model that drafts, if it is another.

    Raises:
        SettingsError: It cannot; says value, rule and remedy.
    """
    if draft is not None:
        _require(isinstance(way, SPECULATIVE), f"draft model: {way.name} drafts nothing. Leave it out, or use a speculative way.")
        check_draft(draft, network)
    if isinstance(way, Full):
        return
    drafter = draft or network
    depths = (way.depth,) if isinstance(way, Fixed | SelfSpeculative) else way.depths
    usable, needs_own_exits = network.depths[:-1], not isinstance(way, Fixed) and draft is None
    _require(bool(usable) or not needs_own_exits, f"{way.name}: the model has no exits before its last layer, so only 'full' can be had. "
                                                  "Name depths to read with the last norm and head, or train exits.")
    _require(bool(depths), f"{way.name}: no exit is named. Name some of {', '.join(map(str, drafter.depths))}.")
    if needs_own_exits:
        for depth in depths:
            _require(depth < network.num_layers, f"{way.name}: depth {depth} is the full model, which has nothing to gain from itself. "
                                                 f"Use some of {', '.join(map(str, usable))}.")
    for depth in depths:
        drafter.check_depth(depth, way.name)
    _require(list(depths) == sorted(set(depths)), f"{way.name}: depths {', '.join(map(str, depths))} do not increase. Sort them.")
    if isinstance(way, EarlyExit | SortedSpeculative | Tree):
        _check_thresholds(way, depths)
    if isinstance(way, SelfSpeculative | SortedSpeculative):
        _in(way.num_draft_tokens, 1, MOST_DRAFT_TOKENS, "num_draft_tokens")
    if isinstance(way, Tree):
        _in(way.num_levels, 1, MOST_DRAFT_TOKENS, "num_levels")
        _in(way.num_branches, 1, min(MOST_TREE_TOKENS, network.vocab_size), "num_branches")
        _in(way.num_nodes, 1, MOST_TREE_TOKENS, "num_nodes")
        _in(way.num_candidates, 0, min(MOST_TREE_TOKENS, network.vocab_size), "num_candidates")


def check_draft(draft: Network, network: Network) -> None:
    """Returns nothing if one model can draft for the other.

    Raises:
        SettingsError: Their vocabularies differ.
    """
    _require(draft.vocab_size == network.vocab_size, f"draft model: it has {draft.vocab_size} tokens and the model "
                                                     f"{network.vocab_size}. Draft with a model of the same vocabulary.")


def _check_thresholds(way: EarlyExit | SortedSpeculative | Tree, depths: Sequence[int]) -> None:
    wanted = depths[:-1] if isinstance(way, Tree) else depths
    _require(len(way.thresholds) == len(wanted), f"thresholds: {len(way.thresholds)} values for {len(wanted)} exits "
                                                 f"({', '.join(map(str, wanted)) or 'none'}). Give one for each.")
    for threshold in way.thresholds:
        _require(0 <= threshold <= 1, f"thresholds: {threshold} is not in 0..1. Give how sure an exit must be, 1 for never.")
    _require(way.measure in MEASURES, f"measure: {way.measure!r} is unknown. Use one of {', '.join(MEASURES)}.")


def _in(value: int, low: int, high: int, name: str) -> None:
    _require(low <= value <= high, f"{name}: {value} is not in {low}..{high}. Change it.")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)
