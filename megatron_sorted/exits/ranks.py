"""Which of an adapter's nested ranks is used at a step: the idea of nested depths, in rank."""

from collections.abc import Sequence

from megatron_sorted.exits.chance import hashed_number


def draw_rank(step: int, seed: int, ranks: Sequence[int]) -> int:
    """Returns one of ``ranks``, each with the same probability; it depends on seed and step alone, so every process draws alike.

    Source: DyLoRA (Valipour et al., arXiv 2210.07558, section 4), which draws the rank of a step from a distribution over 1..r, uniform
    in its experiments; QDyLoRA (arXiv 2402.10462) draws from a list.

    Args:
        step: Number of the step, from 0.
        seed: Of the run.
        ranks: To draw from.
    """
    return ranks[hashed_number(f"adapter rank {seed}/{step}") * len(ranks) >> 64]
