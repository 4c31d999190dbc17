"""The state of a batch during decoding: its cache, and how many tokens each segment has processed.

Deep layers may lag behind shallow ones: a token that exited early has no keys and values above its
exit. The hidden state at every stop is kept, so that deeper layers process the tokens they lack
later, as one small batch, when a token needs them; nothing is computed two times. Each text (row)
has its own length; rows of equal length take a path without masks.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sorted.decoding.cache.idle import acquire, release
from megatron_sorted.decoding.cache.memory import BatchCache
from megatron_sorted.decoding.cache.segment import LayerSegment
from megatron_sorted.decoding.cache.transfer import numbers, slots_from
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.speculation.tree import DraftTree

ROUND = 64
"""Divisor of all capacities."""
PART = 1024
"""Maximum number of tokens of a row in one pass: bounds the memory of long prompts."""


def num_slots(capacity: int) -> int:
    """Return the number of slots for texts of up to ``capacity`` tokens.

    There is one more slot than tokens, at least: the last one takes writes of padding.

    >>> num_slots(63), num_slots(64)
    (64, 128)
    """
    return -(-(capacity + 1) // ROUND) * ROUND


class DecodingState:
    """The state of a batch during decoding; see the module.

    Args:
        network: The model.
        num_rows: Number of texts.
        capacity: Maximum number of tokens of a text, drafts included.
        stops: Depths at which a forward pass may stop; no layer above the deepest ever runs.
    """

    def __init__(self, network: Network, num_rows: int, capacity: int, stops: Sequence[int]):
        self.network, self.lengths = network, [0] * num_rows
        self.capacity = num_slots(capacity)
        self.tree: DraftTree | None = None
        self._use(self._new_memory(num_rows, stops))

    def _new_memory(self, num_rows: int, stops: Sequence[int]) -> BatchCache:
        """Return an empty cache: with graphs, one with recorded passes if the network has any."""
        self._release = None
        if not self.network.graphs:
            return self.network.new_cache(num_rows, self.capacity, stops)
        memory = acquire(self.network, num_rows, self.capacity, stops)
        self._release = weakref.finalize(self, release, self.network, memory)
        self._release.atexit = False
        return memory

    def _use(self, memory: BatchCache) -> None:
        self.memory, self.num_rows, self.capacity = memory, memory.num_rows, memory.capacity
        self.tokens_bc, self.segments = memory.tokens_bc, memory.segments
        self.blocks = memory.blocks

    @property
    def device(self) -> torch.device:
        """Return the device of the cache."""
        return self.tokens_bc.device

    def append(self, tokens_bn: Tensor, counts: Sequence[int] | None = None) -> None:
        """Append tokens to every row; to row i the first ``counts[i]`` (all by default)."""
        n = tokens_bn.size(1)
        counts = [n] * self.num_rows if counts is None else counts
        if len(set(self.lengths)) == 1 and all(count == n for count in counts):
            self.tokens_bc[:, self.lengths[0] : self.lengths[0] + n] = tokens_bn
        else:
            slots, _ = self._slots(self.lengths, counts, n)
            self.tokens_bc.scatter_(1, slots, tokens_bn)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def crop(self, lengths: Sequence[int]) -> None:
        """Drop all but the first ``lengths`` tokens of each row."""
        self.lengths = list(lengths)
        for segment in self.memory.all_segments():
            segment.filled = [
                min(filled, length) for filled, length in zip(segment.filled, lengths, strict=True)
            ]

    def read(self, depth: int) -> None:
        """Run the layers up to the stop ``depth`` on all tokens they have not processed yet."""
        self.read_layers(depth)
        if depth in self.blocks:
            self._fill(self.blocks[depth])

    def read_layers(self, depth: int) -> None:
        """Run the layers up to the stop ``depth``, but not the exit's own block."""
        for stop, segment in self.segments.items():
            if stop <= depth:
                self._fill(segment)

    def logits(self, depth: int, slots_bn: Tensor) -> Tensor:
        """Return the logits [b, n, v] of the exit at ``depth`` in these slots, after `read`.

        They are valid until the next call for the same exit.
        """
        return self.memory.logits(depth, slots_bn)

    def last_slots(self, n: int = 1) -> Tensor:
        """Return the slots [b, n] of the last n tokens of every row."""
        return slots_from([length - n for length in self.lengths], n, self.device)

    def begin_tree(self) -> DraftTree:
        """Start a draft tree without nodes behind the texts; `grow` adds nodes."""
        self.tree = DraftTree.of(self.lengths, self.device)
        return self.tree

    def plant(self, tokens_bt: Tensor, tree: DraftTree) -> None:
        """Start with a copy of a tree, such as another model's draft for the same texts."""
        self.tree = DraftTree(list(self.lengths), tree.parents_bt, tree.levels_bt, tree.seen_btt)
        self.append(tokens_bt)

    def grow(self, tokens_bk: Tensor, parents_bk: Tensor) -> None:
        """Add nodes to the tree; their parents are in it already."""
        self.tree.grow(parents_bk)
        self.append(tokens_bk)

    def keep_nodes(self, nodes: Sequence[Sequence[int]]) -> None:
        """Prune the tree to these nodes; what layers computed for them is kept.

        Args:
            nodes: Nodes of each row, increasing, the same number in each row, with their parents.
        """
        nodes_bm = numbers(nodes, self.device).view(self.num_rows, -1)
        self._compact(nodes, nodes_bm, [len(row) for row in nodes])
        self.tree.select(nodes_bm)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """End the tree: the nodes of each row's path become text, the others are dropped."""
        longest = max(map(len, paths))
        padded = [
            [*path, *range(self.tree.size - longest + len(path), self.tree.size)] for path in paths
        ]
        padded_bm = numbers(padded, self.device).view(self.num_rows, longest)
        self._compact(padded, padded_bm, [len(path) for path in paths])
        self.tree = None

    def _compact(
        self, nodes: Sequence[Sequence[int]], nodes_bm: Tensor, counts: Sequence[int]
    ) -> None:
        """Move nodes to the front of the tree, and drop all but the first ``counts`` of them.

        The nodes are given both as lists and as a tensor, so that the host does not wait.
        """
        first = self.tree.first
        if any(
            list(row[:count]) != list(range(count))
            for row, count in zip(nodes, counts, strict=True)
        ):
            starts = numbers(first, self.device)[:, None]
            _move(
                self.memory,
                starts + nodes_bm,
                starts + torch.arange(nodes_bm.size(1), device=self.device),
            )
        for segment in self.memory.all_segments():
            segment.filled = [
                min(filled, begin) + sum(begin + node < filled for node in row[:count])
                for filled, begin, row, count in zip(
                    segment.filled, first, nodes, counts, strict=True
                )
            ]
        self.lengths = [begin + count for begin, count in zip(first, counts, strict=True)]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, increasing, and drop the others."""
        old, release_old = self.memory, self._release
        if release_old is None:
            old.keep(rows)
            self._use(old)
        else:  # recorded passes are for a fixed number of rows
            self._use(self._new_memory(len(rows), old.stops))
            self.memory.take(old, rows)
            release_old()
        self.lengths = [self.lengths[row] for row in rows]

    def _slots(self, starts: Sequence[int], counts: Sequence[int], n: int) -> tuple[Tensor, Tensor]:
        return self.memory.slots(numbers(starts, self.device), numbers(counts, self.device), n)

    def _fill(self, segment: LayerSegment) -> None:
        """Run a segment on the tokens that it has not processed yet."""
        while any(
            filled < length for filled, length in zip(segment.filled, self.lengths, strict=True)
        ):
            ends = [
                min(length, filled + PART)
                for filled, length in zip(segment.filled, self.lengths, strict=True)
            ]
            self.memory.fill(segment, ends, self.tree)


def _move(memory: BatchCache, sources_bm: Tensor, targets_bm: Tensor) -> None:
    """Copy some slots of each row, with their tokens, keys, values and hidden states, to others."""
    rows = memory.rows()
    memory.tokens_bc[rows, targets_bm] = memory.tokens_bc[rows, sources_bm]
    for segment in memory.all_segments():
        segment.hidden_bch[rows, targets_bm] = segment.hidden_bch[rows, sources_bm]
        for cache in segment.caches:
            cache.keys[rows, :, targets_bm] = cache.keys[rows, :, sources_bm]
            cache.values[rows, :, targets_bm] = cache.values[rows, :, sources_bm]
