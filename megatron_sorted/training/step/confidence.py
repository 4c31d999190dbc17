"""The confidence of every exit in its most likely token, for every counted token of a step.

From these every stage learns, at the end of the step, at which exit each token would leave.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_sorted.settings.layout import Layout

NUM_BINS = 64
"""Number of bins of confidences between 1 / vocabulary and 1, equally wide in their logarithm."""


def bin_edges(vocab_size: int) -> list[float]:
    """Return the borders of the bins, increasing from 1 / vocabulary to 1."""
    return [vocab_size ** (number / NUM_BINS - 1) for number in range(NUM_BINS + 1)]


@dataclass
class Confidences:
    """The number of thresholds passed, for one step: counted tokens x exits of this rank.

    It takes one byte each, on the device. A token's exit under a threshold is the shallowest one
    that passes it. Since thresholds increase, the tokens that an exit gains, over all thresholds,
    are those by which its number of passed thresholds exceeds the largest number at any shallower
    exit. So all that stages must exchange is one byte a token and chunk: the largest number at the
    chunk's exits.

    Attributes:
        group: The pipeline parallel ranks.
        thresholds: The thresholds of this step; empty where the coefficient rule needs none.
        num_counted: {micro-batch: number of its counted tokens}.
        levels: {depth: {micro-batch: thresholds passed [n], uint8}}.
        bins: Number of confidences in each bin, over all tokens and exits of this rank, float64;
            None before the first.
    """

    group: dist.ProcessGroup
    thresholds: tuple[float, ...] = ()
    num_counted: dict[int, int] = field(default_factory=dict)
    levels: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)
    bins: torch.Tensor | None = None

    def add_batch(self, micro_batch: int, num_tokens: int) -> None:
        """Record a micro-batch of ``num_tokens`` counted tokens."""
        self.num_counted[micro_batch] = num_tokens

    def add(
        self, depth: int, micro_batch: int, confidence_n: torch.Tensor, vocab_size: int
    ) -> None:
        """Add the confidence of the exit at ``depth`` in the tokens of a micro-batch."""
        level_n = torch.zeros_like(confidence_n, dtype=torch.uint8)
        for threshold in self.thresholds:
            level_n += confidence_n > threshold
        self.levels.setdefault(depth, {})[micro_batch] = level_n
        position_n = (1 + confidence_n.double().log() / math.log(vocab_size)) * NUM_BINS
        counts = torch.zeros(NUM_BINS, dtype=torch.float64, device=confidence_n.device)
        counts.index_add_(
            0,
            position_n.long().clamp(0, NUM_BINS - 1),
            torch.ones_like(confidence_n, dtype=torch.float64),
        )
        self.bins = counts if self.bins is None else self.bins + counts

    def count(self, layout: Layout, device: torch.device) -> torch.Tensor:
        """Return the sums of the step, float64 [exits + 1 + bins], and forget it.

        They are the tokens that each exit gains over all thresholds, the number of tokens, and the
        bins. A sum over all ranks counts what is the same on tensor parallel ranks once for each of
        them. Exits of other stages and exits that did not train are 0 here; tokens are counted by
        the first stage alone.

        Collective: with several stages one all-gather over the pipeline group, of one byte a
            counted token and chunk.
        """
        depths = layout.depths
        order = sorted(self.num_counted)
        num_tokens = sum(self.num_counted.values())
        level = {
            depth: torch.cat([by_batch[micro_batch] for micro_batch in order])
            for depth, by_batch in self.levels.items()
        }
        sums = torch.zeros(len(depths) + 1 + NUM_BINS, dtype=torch.float64, device=device)
        shallower = self._largest_shallower(layout, level, num_tokens, device)
        for index, depth in enumerate(depths):
            if depth in level:
                sums[index] = (level[depth].int() - shallower[depth].int()).clamp(min=0).sum()
        if self.group.rank() == 0:
            sums[len(depths)] = num_tokens
        if self.bins is not None:
            sums[len(depths) + 1 :] = self.bins
        self.clear()
        return sums

    def _largest_shallower(
        self, layout: Layout, level: dict[int, torch.Tensor], num_tokens: int, device: torch.device
    ) -> dict[int, torch.Tensor]:
        """Return {depth: thresholds passed at the best shallower exit [n], uint8} for this rank.

        Collective: see ``count``.
        """
        chunks, stages = layout.num_chunks, layout.num_stages
        stage = self.group.rank()
        chunk_of = {depth: layout.chunk_at(depth).chunk for depth in level}
        own_cn = torch.zeros(chunks, num_tokens, dtype=torch.uint8, device=device)
        for depth, level_n in level.items():
            chunk = chunk_of[depth]
            own_cn[chunk] = torch.maximum(own_cn[chunk], level_n)
        ordered = own_cn  # in the order in which a token passes the chunks
        if stages > 1:
            gathered = torch.empty(stages, chunks, num_tokens, dtype=torch.uint8, device=device)
            dist.all_gather(list(gathered.unbind(0)), own_cn, group=self.group)
            ordered = gathered.transpose(0, 1).reshape(chunks * stages, num_tokens)
        result = {}
        for depth in sorted(level):
            chunk = chunk_of[depth]
            before = ordered[: chunk * stages + stage]
            largest = torch.zeros(num_tokens, dtype=torch.uint8, device=device)
            if before.size(0):
                largest = before.amax(0)
            for other in level:
                if other < depth and chunk_of[other] == chunk:
                    largest = torch.maximum(largest, level[other])
            result[depth] = largest
        return result

    def clear(self) -> None:
        """Forget the step."""
        self.num_counted.clear()
        self.levels.clear()
        self.bins = None
