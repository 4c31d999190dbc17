"""The memory of a batch of texts, and forward passes on it.

It holds the tokens, the KV cache, and the hidden states at every stop; `state` knows how long each
text is. A pass can take its tokens' positions from the device. Then no number comes from the host,
there are few shapes and the memory stays where it is, so that the pass can be recorded as a graph
and replayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sorted.decoding.cache.layer import KVCache
from megatron_sorted.decoding.cache.passes import Passes
from megatron_sorted.decoding.cache.places import Places, halves, rotation_tables
from megatron_sorted.decoding.cache.segment import LayerSegment
from megatron_sorted.decoding.cache.transfer import numbers, set_numbers
from megatron_sorted.decoding.cache.weights import Weights
from megatron_sorted.decoding.speculation.tree import DraftTree

MAX_WIDTH = 65
"""Maximum number of new tokens of a row in a replayed pass: the longest draft and one token."""
MIN_SPAN = 128
"""Smallest number of slots that a replayed pass attends to; larger ones are powers of two."""


@dataclass
class Fill:
    """The wish to run a segment of a cache on the tokens that it has not processed yet.

    Attributes:
        memory: The cache.
        segment: The segment, one of the cache's.
        ends: End of the slots to fill, by row.
        tree: Draft tree behind the texts; None without one.
        is_step: Whether a cache of one row has a few tokens that follow others, which may be
            joined with those of other caches.
    """

    memory: "BatchCache"
    segment: LayerSegment
    ends: Sequence[int]
    tree: DraftTree | None
    is_step: bool = False


class BatchCache:
    """The memory of a batch of texts; see the module.

    Args:
        weights: The weights that run the passes.
        num_rows: Number of texts.
        capacity: Number of slots of each text; the last one takes writes of padding.
        stops: Depths at which a forward pass may stop.
        passes: Recorder of passes whose positions are on the device; None for positions from the
            host.
    """

    # a NaN would spread through attention even where it is masked
    allocate = staticmethod(torch.zeros)

    def __init__(
        self,
        weights: Weights,
        num_rows: int,
        capacity: int,
        stops: Sequence[int],
        passes: Passes | None = None,
    ):
        self.num_rows, self.capacity = num_rows, capacity
        self.stops, self.passes = tuple(sorted(set(stops))), passes
        self.embedding, self.readouts = weights.embedding, weights.readouts
        self.dtype, self.cache_dtype = weights.state_dtype, weights.cache_dtype
        device = weights.embedding.device
        self.tokens_bc = torch.zeros(num_rows, capacity, dtype=torch.long, device=device)
        self.cos_cd, self.sin_cd = rotation_tables(weights.rope, capacity, self.dtype, device)
        self.segments: dict[int, LayerSegment] = {}
        self.blocks: dict[int, LayerSegment] = {}
        start = 0
        for stop in self.stops:
            self.segments[stop] = self._make_segment(start, weights.layers[start:stop])
            readout = weights.readouts.get(stop)
            if readout is not None and readout.block is not None:
                self.blocks[stop] = self._make_segment(stop, [readout.block], readout.adapter)
            start = stop
        if passes is not None:
            self._starts_b, self._counts_b = (
                torch.zeros(num_rows, dtype=torch.long, device=device) for _ in range(2)
            )
            self._slots_bn = torch.zeros(num_rows, MAX_WIDTH, dtype=torch.long, device=device)
            self._counts: list[int] = []

    def _make_segment(
        self, source: int, layers: Sequence[Any], adapter: Any = None
    ) -> LayerSegment:
        def new(dtype: torch.dtype, *shape: int) -> Tensor:
            return self.allocate(shape, dtype=dtype, device=self.device)

        b, c = self.num_rows, self.capacity
        caches = [
            KVCache(new(self.cache_dtype, 2, b, layer.num_groups, c, layer.head_size))
            for layer in layers
        ]
        hidden_bch = new(self.dtype, b, c, self.embedding.size(1))
        return LayerSegment(source, layers, adapter, caches, hidden_bch)

    @property
    def device(self) -> torch.device:
        """Return the device of the memory."""
        return self.tokens_bc.device

    def all_segments(self) -> list[LayerSegment]:
        """Return the segments, those of the exits' own blocks last."""
        return [*self.segments.values(), *self.blocks.values()]

    def tensors(self) -> list[Tensor]:
        """Return all tensors with a row per text."""
        segments = self.all_segments()
        return [self.tokens_bc, *(tensor for one in segments for tensor in one.tensors())]

    @property
    def num_bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def clear(self) -> None:
        """Set everything to zero: a NaN would spread through attention even where it is masked."""
        for tensor in self.tensors():
            tensor.zero_()
        for segment in self.all_segments():
            segment.filled = [0] * self.num_rows

    def take(self, other: "BatchCache", rows: Sequence[int]) -> None:
        """Copy these rows of a cache with the same stops."""
        index = numbers(rows, self.device)
        with torch.no_grad():
            for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
                torch.index_select(theirs, 0, index, out=mine)
        for mine, theirs in zip(self.all_segments(), other.all_segments(), strict=True):
            mine.filled = [theirs.filled[row] for row in rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, increasing, and drop the others.

        Nothing is allocated, since a second cache may not fit beside this one.
        """
        assert list(rows) == sorted(set(rows))
        with torch.no_grad():
            for tensor in self.tensors():
                for new, old in enumerate(rows):
                    if new != old:
                        tensor[new] = tensor[old]
        self.num_rows, self.tokens_bc = len(rows), self.tokens_bc[: len(rows)]
        for segment in self.all_segments():
            segment.hidden_bch = segment.hidden_bch[: len(rows)]
            segment.filled = [segment.filled[row] for row in rows]
            segment.caches = [KVCache(cache.both[:, : len(rows)]) for cache in segment.caches]

    def fill(self, segment: LayerSegment, ends: Sequence[int], tree: DraftTree | None) -> None:
        """Run a segment on the tokens that it has not processed yet.

        Args:
            segment: The segment.
            ends: End of the slots to fill, by row.
            tree: Draft tree behind the texts; None without one.
        """
        counts = [end - filled for end, filled in zip(ends, segment.filled, strict=True)]
        n = max(counts)
        in_tree = tree is not None and any(
            end > begin for end, begin in zip(ends, tree.first, strict=True)
        )
        if self.passes is not None and not in_tree and n <= MAX_WIDTH and min(segment.filled) > 0:
            self.run_pass(segment, segment.filled, counts)
        elif len(set(segment.filled)) == 1 and len(set(ends)) == 1 and not in_tree:
            first, end = segment.filled[0], ends[0]
            span = slice(first, end)
            cos, sin = (halves(table[None, span]) for table in (self.cos_cd, self.sin_cd))
            self.run(segment, (slice(None), span), Places(cos, sin, end, first))
        else:
            slots, counted = self.slots(
                numbers(segment.filled, self.device), numbers(counts, self.device), n
            )
            places = self.places(slots, counted, max(ends), tree)
            self.run(segment, (places.rows_b1, slots), places)
        segment.filled = list(ends)

    @classmethod
    def fill_all(cls, groups: Sequence[Sequence[Fill]]) -> None:
        """Run segments on tokens of many caches of a network.

        torch rounds a product of another number of rows otherwise. Steps are joined in products
        that always have `STEP_ROWS` rows; every other fill is a pass of its own.

        Args:
            groups: For each segment, from shallow to deep, the caches that need it.
        """
        for group in groups:
            steps = [fill for fill in group if fill.is_step]
            if steps:
                run_steps(steps)
            for fill in group:
                if not fill.is_step:
                    fill.memory.fill(fill.segment, fill.ends, fill.tree)

    @classmethod
    def logits_all(
        cls, depth: int, wanted: Sequence[tuple["BatchCache", Tensor]], joins: bool = False
    ) -> list[Tensor]:
        """Return the logits of the exit at ``depth`` in slots [b, n] of many caches.

        Args:
            depth: The exit's depth.
            wanted: The caches and their slots.
            joins: Whether to join those with few slots as steps are joined.
        """
        logits = {
            index: memory.logits(depth, slots_bn)
            for index, (memory, slots_bn) in enumerate(wanted)
            if not joins or memory.num_rows > 1 or slots_bn.size(1) > STEP_ROWS
        }
        few = [index for index in range(len(wanted)) if index not in logits]
        if few:
            hidden = []
            for memory, slots_bn in (wanted[index] for index in few):
                hidden_bch = (memory.blocks.get(depth) or memory.segments[depth]).hidden_bch
                hidden.append(hidden_bch[0, slots_bn[0]])
            readout = wanted[0][0].readouts[depth]
            rows_tv = readout.logits(padded_rows(torch.cat(hidden)), STEP_ROWS)
            parts = rows_tv.split([*map(len, hidden), rows_tv.size(0) - sum(map(len, hidden))])
            logits |= {index: part[None] for index, part in zip(few, parts, strict=False)}
        return [logits[index] for index in range(len(wanted))]

    def run(self, segment: LayerSegment, at: tuple, places: Places) -> None:
        """Run the layers of a segment on the tokens in the slots ``at``."""
        hidden = (
            F.embedding(self.tokens_bc[at], self.embedding)
            if segment.source == 0
            else self.segments[segment.source].hidden_bch[at]
        )
        if segment.adapter is not None:
            hidden = segment.adapter(hidden)
        hidden_th = hidden.flatten(0, 1)
        for layer, cache in zip(segment.layers, segment.caches, strict=True):
            hidden_th = layer(hidden_th, places, cache)
        segment.hidden_bch[at] = hidden_th.view_as(hidden)

    def logits(self, depth: int, slots_bn: Tensor) -> Tensor:
        """Return the logits [b, n, v] of the exit at ``depth`` in these slots, already filled.

        They are valid until the next call for the same exit.
        """
        if self.passes is None or slots_bn.size(1) > MAX_WIDTH:
            return self._logits(depth, slots_bn)
        static = self._slots_bn[:, : slots_bn.size(1)]
        static.copy_(slots_bn)
        return self.passes((depth, slots_bn.size(1)), lambda: self._logits(depth, static))

    def _logits(self, depth: int, slots_bn: Tensor) -> Tensor:
        hidden = (self.blocks.get(depth) or self.segments[depth]).hidden_bch
        return self.readouts[depth].logits(
            hidden.gather(1, slots_bn[:, :, None].expand(-1, -1, hidden.size(2)))
        )

    def slots(self, starts_b: Tensor, counts_b: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return the slots of up to n consecutive tokens of each row, and which are no padding.

        Padding is written to the last slot.
        """
        step = torch.arange(n, device=self.device)
        padding = step >= counts_b[:, None]
        return (starts_b[:, None] + step).masked_fill(padding, self.capacity - 1), ~padding

    def rows(self) -> Tensor:
        """Return the row numbers, [b, 1]."""
        return torch.arange(self.num_rows, device=self.device)[:, None]

    def places(
        self, slots_bn: Tensor, counted_bn: Tensor, span: int, tree: DraftTree | None = None
    ) -> Places:
        """Return the places of tokens in any slots, in a draft tree or not.

        Args:
            slots_bn: Slots of the new tokens.
            counted_bn: Which of them are no padding.
            span: Number of slots that any of them may attend to.
            tree: Draft tree behind the texts; None without one.
        """
        keys = torch.arange(span, device=self.device)
        seen = keys <= slots_bn[:, :, None]
        positions, key_positions = slots_bn, keys.expand(self.num_rows, -1)
        if tree is not None and tree.size:
            first, size = numbers(tree.first, self.device)[:, None], tree.size
            node, key_node = slots_bn - first, keys - first
            inside, key_inside = (node >= 0) & (node < size), (key_node >= 0) & (key_node < size)
            node, key_node = node.clamp(0, size - 1), key_node.clamp(0, size - 1)
            positions = torch.where(inside, first + tree.levels_bt.gather(1, node) - 1, positions)
            key_positions = torch.where(
                key_inside, first + tree.levels_bt.gather(1, key_node) - 1, key_positions
            )
            below = tree.seen_btt.gather(1, node[:, :, None].expand(-1, -1, size))
            below = below.gather(2, key_node[:, None].expand(-1, slots_bn.size(1), -1))
            seen = torch.where(inside[:, :, None] & key_inside[:, None], below, seen)
        # padding attends to slot 0: a softmax over nothing is not a number
        seen = torch.where(counted_bn[:, :, None], seen, keys == 0)
        positions = positions.clamp(max=self.capacity - 1)
        return Places(
            halves(self.cos_cd[positions]),
            halves(self.sin_cd[positions]),
            span,
            None,
            self.rows(),
            slots_bn,
            positions,
            key_positions,
            seen,
        )

    def run_pass(self, segment: LayerSegment, starts: Sequence[int], counts: Sequence[int]) -> None:
        """Run a segment on ``counts`` tokens of each row; replay the pass if it is recorded."""
        n = max(counts)
        end = max(start + count for start, count in zip(starts, counts, strict=True))
        span = min(max(MIN_SPAN, 1 << (end - 1).bit_length()), self.capacity)
        set_numbers(self._starts_b, starts)
        if list(counts) != self._counts:
            set_numbers(self._counts_b, counts)
            self._counts = list(counts)

        def work() -> None:
            slots, counted = self.slots(self._starts_b, self._counts_b, n)
            places = self.places(slots, counted, span)
            self.run(segment, (places.rows_b1, slots), places)

        self.passes((segment, n, span), work)


STEP_ROWS = 8
"""Number of rows of every product of joined steps: no row then depends on how many there are."""


def padded_rows(rows_th: Tensor) -> Tensor:
    """Return rows with zeros behind them, up to a multiple of `STEP_ROWS`."""
    return F.pad(rows_th, (0, 0, 0, -rows_th.size(0) % STEP_ROWS))


def run_steps(fills: Sequence[Fill]) -> None:
    """Run a segment on a few tokens of each of many caches of one row, in joined products."""
    hidden, texts = [], []
    for fill in fills:
        memory, segment = fill.memory, fill.segment
        first, end = segment.filled[0], fill.ends[0]
        at = slice(first, end)
        hidden.append(
            F.embedding(memory.tokens_bc[0, at], memory.embedding)
            if segment.source == 0
            else memory.segments[segment.source].hidden_bch[0, at]
        )
        cos, sin = (halves(table[None, at]) for table in (memory.cos_cd, memory.sin_cd))
        texts.append(Places(cos, sin, end, first))
    hidden_th = padded_rows(torch.cat(hidden))
    for number, layer in enumerate(fills[0].segment.layers):
        caches = [fill.segment.caches[number] for fill in fills]
        hidden_th = layer.run(hidden_th, list(zip(texts, caches, strict=True)), STEP_ROWS)
    done = hidden_th.split([*map(len, hidden), hidden_th.size(0) - sum(map(len, hidden))])
    for fill, rows in zip(fills, done, strict=False):
        fill.segment.hidden_bch[0, fill.segment.filled[0] : fill.ends[0]] = rows
        fill.segment.filled = list(fill.ends)
