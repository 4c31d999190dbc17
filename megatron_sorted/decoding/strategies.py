"""What is asked of decoding: a way to generate with its options, and how tokens are chosen. Needs no torch."""

from dataclasses import dataclass

from megatron_sorted.errors import SettingsError

MEASURES = ("probability", "margin", "entropy")
"""Names of the measures of how sure an exit is; `sampling.SURENESS` computes them."""


@dataclass(frozen=True)
class SamplingParameters:
    """How tokens are chosen.

    Attributes:
        temperature: By which logits are divided; 0 takes the most likely token.
        top_k: Only so many most likely tokens; None for all.
        top_p: Only the fewest most likely tokens whose probabilities sum to at least this.
        repetition_penalty: Logits of tokens in the text so far are divided by it if positive, multiplied if negative (CTRL, arXiv
            1909.05858, section 4.1).
        seed: Of the noise.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that the numbers mean something.

        Raises:
            SettingsError: One does not.
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
class TreeSpeculative:
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
        """Return how many followers of a node are looked at."""
        return self.num_candidates or self.num_branches


Strategy = Full | Fixed | EarlyExit | SelfSpeculative | SortedSpeculative | TreeSpeculative
SPECULATIVE = (SelfSpeculative, SortedSpeculative, TreeSpeculative)
STRATEGIES = {
    strategy.name: strategy
    for strategy in (Full, Fixed, EarlyExit, SelfSpeculative, SortedSpeculative, TreeSpeculative)
}


def draft_depths(strategy: Strategy) -> tuple[int, ...]:
    """Return the exits that draft, increasing."""
    if isinstance(strategy, SelfSpeculative):
        return (strategy.depth,)
    return strategy.depths if isinstance(strategy, SortedSpeculative | TreeSpeculative) else ()


def draft_slots(strategy: Strategy) -> int:
    """Return the most tokens that stand behind a text while it is drafted."""
    if isinstance(strategy, TreeSpeculative):
        # what is grown before it is cut to num_nodes
        return (
            1
            + strategy.num_branches * (strategy.num_levels - 1)
            + strategy.num_nodes
            + strategy.candidates
        )
    return strategy.num_draft_tokens if isinstance(strategy, SPECULATIVE) else 0
