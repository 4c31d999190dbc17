"""Decoding strategies with their options, and the parameters of sampling. Needs no torch."""

from dataclasses import dataclass

from megatron_sorted.errors import SettingsError


@dataclass(frozen=True)
class SamplingParameters:
    """How tokens are chosen.

    Attributes:
        temperature: Divisor of the logits; 0 takes the most likely token.
        top_k: Number of most likely tokens to choose from; None for all.
        top_p: Probability mass to choose from: the fewest most likely tokens that reach it.
        repetition_penalty: Factor for tokens that are in the text so far: their positive logits
            are divided by it, their negative ones multiplied (CTRL, arXiv 1909.05858, section 4.1).
        seed: Seed of the noise.

    >>> SamplingParameters(temperature=0.7, top_p=0.9).top_k is None
    True
    >>> SamplingParameters(top_p=1.5)
    Traceback (most recent call last):
    ...
    megatron_sorted.errors.SettingsError: top_p: 1.5 is not above 0 and at most 1. Change it, or \
leave it out.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that every number is in its range.

        Raises:
            SettingsError: A number is out of its range.
        """
        for name, holds, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not holds:
                raise SettingsError(
                    f"{name}: {getattr(self, name)} is not {rule}. Change it, or leave it out."
                )


@dataclass(frozen=True)
class Full:
    """Every token comes from the full model."""

    name = "full"


@dataclass(frozen=True)
class Fixed:
    """Every token comes from the sub-model of one exit, as if the model ended there.

    Attributes:
        depth: The exit's depth.
    """

    depth: int
    name = "fixed"


@dataclass(frozen=True)
class EarlyExit:
    """Every token comes from the first exit whose confidence is above its threshold.

    The full model takes the remaining tokens. This is faster, but changes the text.
    Source: Sorted LLaMA (arXiv 2309.08968, section 3.3), CALM (arXiv 2207.07061).

    Attributes:
        depths: Exits that are evaluated, increasing, without the full model.
        thresholds: Confidence that each of them needs.
        measure: Measure of confidence: probability, margin or entropy.
    """

    depths: tuple[int, ...]
    thresholds: tuple[float, ...]
    measure: str = "probability"
    name = "early_exit"


@dataclass(frozen=True)
class SelfSpeculative:
    """One exit drafts some tokens, and the layers above it verify them at once.

    The layers below the exit run only once. Source: LayerSkip (arXiv 2404.16710, section 4.3).

    Attributes:
        depth: Depth of the exit that drafts.
        num_draft_tokens: Number of tokens drafted before each verification.
    """

    depth: int
    num_draft_tokens: int = 4
    name = "self_speculative"


@dataclass(frozen=True)
class SortedSpeculative:
    """Each drafted token comes from the first exit whose confidence is above its threshold.

    Drafting ends when the confidence of even the deepest draft exit is too low.
    Source: S2D (arXiv 2407.01955, section 3), without its bias when sampling (see ``sampling``).

    Attributes:
        depths: Exits that draft, increasing.
        thresholds: Confidence that each of them needs.
        num_draft_tokens: Maximum number of tokens drafted before a verification.
        measure: Measure of confidence: probability, margin or entropy.
    """

    depths: tuple[int, ...]
    thresholds: tuple[float, ...]
    num_draft_tokens: int = 8
    measure: str = "probability"
    name = "sorted_speculative"


@dataclass(frozen=True)
class TreeSpeculative:
    """A tree of drafted tokens is grown along likely paths, pruned to its best nodes and verified.

    Source: EAGLE-2 (arXiv 2406.16858, sections 4.1 and 4.2). That one exit drafts a whole level
    follows the published code of SD2.

    Attributes:
        depths: Exits that draft, increasing. A level comes from the first exit that has the
            confidence it needs in the level's most likely node.
        thresholds: Confidence that each exit but the last needs.
        num_levels: Number of drafted levels.
        num_branches: Number of nodes of a level that are expanded.
        num_nodes: Number of nodes that are verified.
        num_candidates: Number of next tokens considered for each expanded node; 0 for
            ``num_branches``. With one branch and some candidates a draft costs no more than a
            chain, and the second best tokens are verified too, where a chain would break.
        measure: Measure of confidence: probability, margin or entropy.
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
        """Return the number of next tokens considered for each expanded node."""
        return self.num_candidates or self.num_branches


Strategy = Full | Fixed | EarlyExit | SelfSpeculative | SortedSpeculative | TreeSpeculative
SPECULATIVE = (SelfSpeculative, SortedSpeculative, TreeSpeculative)
STRATEGIES = {
    strategy.name: strategy
    for strategy in (Full, Fixed, EarlyExit, SelfSpeculative, SortedSpeculative, TreeSpeculative)
}


def draft_depths(strategy: Strategy) -> tuple[int, ...]:
    """Return the exits that draft, increasing; an empty tuple if the strategy drafts nothing.

    >>> draft_depths(SelfSpeculative(depth=8)), draft_depths(EarlyExit((4, 8), (0.9, 0.9)))
    ((8,), ())
    """
    if isinstance(strategy, SelfSpeculative):
        return (strategy.depth,)
    return strategy.depths if isinstance(strategy, SortedSpeculative | TreeSpeculative) else ()


def draft_slots(strategy: Strategy) -> int:
    """Return the number of cache slots that drafted tokens need behind a text."""
    if isinstance(strategy, TreeSpeculative):
        # the tree is larger before it is pruned to num_nodes
        return (
            1
            + strategy.num_branches * (strategy.num_levels - 1)
            + strategy.num_nodes
            + strategy.candidates
        )
    return strategy.num_draft_tokens if isinstance(strategy, SPECULATIVE) else 0
