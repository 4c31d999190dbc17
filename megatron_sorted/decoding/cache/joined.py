"""Forward passes of many texts, joined: each may be of another text, depth and length."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_sorted.decoding.cache.memory import STEP_ROWS, Fill
from megatron_sorted.decoding.cache.segment import LayerSegment
from megatron_sorted.decoding.cache.state import DecodingState


@dataclass(eq=False)
class ForwardPass:
    """The wish for an exit's logits in some slots, after all tokens of the texts have run there.

    Attributes:
        state: The texts.
        depth: The exit's depth.
        slots_bn: The slots.
    """

    state: DecodingState
    depth: int
    slots_bn: Tensor

    def run(self) -> Tensor:
        """Run it alone; return the logits [b, n, v]."""
        self.state.read(self.depth)
        return self.state.logits(self.depth, self.slots_bn)

    def segments(self) -> list[tuple[Hashable, LayerSegment]]:
        """Return the segments that it needs, from shallow to deep, the exit's own block last."""
        state = self.state
        needed: list[tuple[Hashable, LayerSegment]] = [
            ((False, stop), segment)
            for stop, segment in state.segments.items()
            if stop <= self.depth
        ]
        if self.depth in state.blocks:
            needed.append(((True, self.depth), state.blocks[self.depth]))
        return needed

    @property
    def num_missing(self) -> int:
        """Return the number of tokens that its slowest segment has not processed yet."""
        return max(
            length - filled
            for _, segment in self.segments()
            for length, filled in zip(self.state.lengths, segment.filled, strict=True)
        )


@dataclass(frozen=True)
class Joined:
    """What joined passes did.

    Attributes:
        logits: Logits [b, n, v] of each pass that is complete; None for the others.
        num_layers: Number of layers that ran for each pass, summed over its tokens.
    """

    logits: list[Tensor | None]
    num_layers: list[int]


def run_joined(passes: Sequence[ForwardPass], pieces: Sequence[int]) -> Joined:
    """Run passes of texts of one network, as few calls as there are segments and exits.

    Args:
        passes: The passes; their states have the same stops up to their depths.
        pieces: Maximum number of tokens that a segment processes of each text of each pass, so
            that a long prompt takes several calls.
    """
    groups: dict[Hashable, list[Fill]] = {}
    num_layers, complete = [0] * len(passes), [True] * len(passes)
    for index, (wanted, piece) in enumerate(zip(passes, pieces, strict=True)):
        state = wanted.state
        lagging = state.lengths
        for key, segment in wanted.segments():
            # no segment runs ahead of the one that it continues
            ends = [
                min(before, filled + piece)
                for before, filled in zip(lagging, segment.filled, strict=True)
            ]
            lagging = [max(end, filled) for end, filled in zip(ends, segment.filled, strict=True)]
            count = sum(end - filled for end, filled in zip(lagging, segment.filled, strict=True))
            if count:
                is_step = (
                    state.network.joins_steps
                    and state.num_rows == 1
                    and state.tree is None
                    and segment.filled[0] > 0
                    and state.lengths[0] - segment.filled[0] <= STEP_ROWS
                )
                groups.setdefault(key, []).append(
                    Fill(state.memory, segment, lagging, state.tree, is_step)
                )
                num_layers[index] += count * len(segment.layers)
            complete[index] &= lagging == state.lengths
    if groups:
        memory = passes[0].state.memory
        memory.fill_all([groups[key] for key in sorted(groups)])
    logits: list[Tensor | None] = [None] * len(passes)
    done = [index for index, is_complete in enumerate(complete) if is_complete]
    joins = bool(passes) and passes[0].state.network.joins_steps
    for depth in sorted({passes[index].depth for index in done}):
        here = [index for index in done if passes[index].depth == depth]
        wanted = [(passes[index].state.memory, passes[index].slots_bn) for index in here]
        for index, part in zip(here, wanted[0][0].logits_all(depth, wanted, joins), strict=True):
            logits[index] = part
    return Joined(logits, num_layers)
