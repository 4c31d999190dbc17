"""How sure every exit is of every counted token of a step: where tokens would leave, known to all stages at the step's end."""

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sorted.settings.layout import Layout

NUM_BINS = 64
"""Of confidences between 1 / vocabulary and 1, equally wide in their logarithm."""


def bin_edges(vocab_size: int) -> list[float]:
    """Return the borders of the bins, increasing from 1 / vocabulary to 1."""
    return [vocab_size ** (number / NUM_BINS - 1) for number in range(NUM_BINS + 1)]


@dataclass
class Confidences:
    """One byte on the device for each counted token and exit of this rank, for one step: how many thresholds it passes.

    A token's exit under a threshold is the shallowest one that passes it. Since thresholds increase, an exit gains as many tokens,
    over all thresholds, as its number of passed thresholds exceeds the largest number at any shallower exit. So all that
    stages must tell each other is one byte a token and chunk: the largest number at the chunk's exits.

    Attributes:
        thresholds: Of the step; none where nobody asks.
        num_counted: {micro-batch: its counted tokens}.
        levels: {depth: {micro-batch: thresholds passed [n], uint8}}.
        bins: Confidences of all tokens and exits of this rank by bin, float64; None before the first.
    """

    thresholds: tuple[float, ...] = ()
    num_counted: dict[int, int] = field(default_factory=dict)
    levels: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)
    bins: torch.Tensor | None = None

    def add(
        self, depth: int, micro_batch: int, confidence_n: torch.Tensor, vocab_size: int
    ) -> None:
        """Take in how sure the exit at ``depth`` is of the tokens of a micro-batch."""
        level_n = torch.zeros_like(confidence_n, dtype=torch.uint8)
        for threshold in self.thresholds:
            level_n += confidence_n > threshold
        self.levels.setdefault(depth, {})[micro_batch] = level_n
        place_n = (
            ((1 + confidence_n.double().log() / math.log(vocab_size)) * NUM_BINS)
            .long()
            .clamp(0, NUM_BINS - 1)
        )
        counts = torch.zeros(NUM_BINS, dtype=torch.float64, device=confidence_n.device)
        counts.index_add_(0, place_n, torch.ones_like(confidence_n, dtype=torch.float64))
        self.bins = counts if self.bins is None else self.bins + counts

    def count(self, layout: Layout, device: torch.device) -> torch.Tensor:
        """Return [exits + 1 + bins], float64, and forget the step: what each exit gains over all thresholds, tokens, bins.

        A sum over all ranks counts what is the same on tensor parallel ranks as often as there are such ranks. Exits of other stages are
        0 here, so are those that did not train; tokens are counted by the first stage alone.

        Collective: with several stages one all-gather over the pipeline group, of one byte a counted token and chunk.
        """
        depths = layout.depths
        order = sorted(self.num_counted)
        num_tokens = sum(self.num_counted.values())
        level = {
            depth: torch.cat([by_batch[micro_batch] for micro_batch in order])
            for depth, by_batch in self.levels.items()
        }
        row = torch.zeros(len(depths) + 1 + NUM_BINS, dtype=torch.float64, device=device)
        shallower = self._largest_shallower(layout, level, num_tokens, device)
        for place, depth in enumerate(depths):
            if depth in level:
                row[place] = (level[depth].int() - shallower[depth].int()).clamp(min=0).sum()
        if parallel_state.get_pipeline_model_parallel_rank() == 0:
            row[len(depths)] = num_tokens
        if self.bins is not None:
            row[len(depths) + 1 :] = self.bins
        self.clear()
        return row

    def _largest_shallower(
        self, layout: Layout, level: dict[int, torch.Tensor], num_tokens: int, device: torch.device
    ) -> dict[int, torch.Tensor]:
        """Return {depth: largest number of passed thresholds at any shallower exit [n], uint8} for the exits of this rank.

        Collective: see ``count``.
        """
        chunks, stages = layout.num_chunks, layout.num_stages
        stage = parallel_state.get_pipeline_model_parallel_rank()
        chunk_of = {depth: layout.chunk_at(depth).chunk for depth in level}
        mine_cn = torch.zeros(chunks, num_tokens, dtype=torch.uint8, device=device)
        for depth, level_n in level.items():
            chunk = chunk_of[depth]
            mine_cn[chunk] = torch.maximum(mine_cn[chunk], level_n)
        passing = mine_cn  # in the order in which a token passes the chunks
        if stages > 1:
            everyone = torch.empty(stages, chunks, num_tokens, dtype=torch.uint8, device=device)
            dist.all_gather(
                list(everyone.unbind(0)),
                mine_cn,
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
            passing = everyone.transpose(0, 1).reshape(chunks * stages, num_tokens)
        result = {}
        for depth in sorted(level):
            chunk = chunk_of[depth]
            before = passing[: chunk * stages + stage]
            largest = (
                before.amax(0)
                if before.size(0)
                else torch.zeros(num_tokens, dtype=torch.uint8, device=device)
            )
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
