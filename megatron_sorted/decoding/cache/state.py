"""A batch of texts on its way: tokens, keys and values of every layer, and how far each depth has read.

A text may be read to one depth further than to another: tokens that left early have no keys and values above their exit. The hidden state
after each depth where reading may stop is kept, so deeper layers fill what they miss later, as one small batch, when a token needs them;
nothing is computed twice. Each text (row) has a length of its own; rows that stand alike take a path without masks.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sorted.decoding.cache.memory import (
    MOST_WIDTH,
    LayerSegment,
    Memory,
    lend,
    move,
    take_back,
)
from megatron_sorted.decoding.cache.places import Places
from megatron_sorted.decoding.cache.transfer import numbers, slots_from
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.speculation.tree import DraftTree

ROUND = 64
"""Capacities are multiples of it."""
PART = 1024
"""Most tokens of a row that are read at once: bounds the memory of long prompts."""


class State:
    """See the module.

    Args:
        network: What reads.
        num_rows: Texts.
        capacity: Tokens a text may have, drafts included.
        stops: Depths at which reading may stop; the deepest is the deepest that is ever read.
    """

    def __init__(self, network: Network, num_rows: int, capacity: int, stops: Sequence[int]):
        self.network, self.lengths = network, [0] * num_rows
        self.capacity = (
            -(-(capacity + 1) // ROUND) * ROUND
        )  # the last slot takes what is written for nobody
        self.tree: DraftTree | None = None
        self._take(self._memory(num_rows, stops))

    def _memory(self, num_rows: int, stops: Sequence[int]) -> Memory:
        """Return memory without texts: some of the network's where it keeps any, so that what was recorded on it can be used again."""
        self._give_back = None
        if not self.network.graphs:
            return Memory(self.network, num_rows, self.capacity, stops)
        memory = lend(self.network, num_rows, self.capacity, stops)
        self._give_back = weakref.finalize(self, take_back, self.network, memory)
        self._give_back.atexit = False
        return memory

    def _take(self, memory: Memory) -> None:
        self.memory, self.num_rows, self.capacity = memory, memory.num_rows, memory.capacity
        self.tokens_bc, self.runs, self.blocks = memory.tokens_bc, memory.runs, memory.blocks

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.tokens_bc.device

    def append(self, tokens_bn: Tensor, counts: Sequence[int] | None = None) -> None:
        """Add tokens behind every row; of row i the first ``counts[i]`` (all by default)."""
        n = tokens_bn.size(1)
        counts = [n] * self.num_rows if counts is None else counts
        if len(set(self.lengths)) == 1 and all(count == n for count in counts):
            self.tokens_bc[:, self.lengths[0] : self.lengths[0] + n] = tokens_bn
        else:
            slots, _ = self._slots(self.lengths, counts, n)
            self.tokens_bc.scatter_(1, slots, tokens_bn)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget what comes after the first ``lengths`` tokens of each row."""
        self.lengths = list(lengths)
        for run in self.memory.all_runs():
            run.filled = [
                min(filled, length) for filled, length in zip(run.filled, lengths, strict=True)
            ]

    def read(self, depth: int) -> None:
        """Read every row to ``depth``, one of the stops: each run of layers below it, those tokens that it has not read yet."""
        self.read_layers(depth)
        if depth in self.blocks:
            self._fill(self.blocks[depth])

    def read_layers(self, depth: int) -> None:
        """Read every row to ``depth`` without the exit's own block."""
        for stop, run in self.runs.items():
            if stop <= depth:
                self._fill(run)

    def logits(self, depth: int, slots_bn: Tensor) -> Tensor:
        """Return the logits [b, n, v] of the exit at ``depth`` after the tokens at these slots, which it has read.

        They are valid until the same exit is asked again.
        """
        if self.memory.passes is not None and slots_bn.size(1) <= MOST_WIDTH:
            return self.memory.pass_logits(depth, slots_bn)
        return self.memory.logits(depth, slots_bn)

    def last_slots(self, n: int = 1) -> Tensor:
        """Return the slots [b, n] of the last n tokens of every row."""
        return slots_from([length - n for length in self.lengths], n, self.device)

    def begin_tree(self) -> DraftTree:
        """Return the tree behind the texts, without nodes; `grow` adds some."""
        self.tree = DraftTree.of(self.lengths, self.device)
        return self.tree

    def plant(self, tokens_bt: Tensor, tree: DraftTree) -> None:
        """Begin with a tree that is there already, such as another model's draft of the same texts; share nothing with it."""
        self.tree = DraftTree(list(self.lengths), tree.parents_bt, tree.levels_bt, tree.seen_btt)
        self.append(tokens_bt)

    def grow(self, tokens_bk: Tensor, parents_bk: Tensor) -> None:
        """Add nodes to the tree, whose parents are in it."""
        self.tree.grow(parents_bk)
        self.append(tokens_bk)

    def keep_nodes(self, nodes: Sequence[Sequence[int]]) -> None:
        """Keep these nodes of every row's tree, as many of each, increasing, closed under parents; what was read of them stays read."""
        index = numbers(nodes, self.device).view(self.num_rows, -1)
        self._move(nodes, index, [len(row) for row in nodes])
        self.tree.select(index)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """End the tree: the nodes of each row's path become text, the others are forgotten."""
        longest = max(map(len, paths))
        padded = [
            [*path, *range(self.tree.size - longest + len(path), self.tree.size)] for path in paths
        ]
        self._move(
            padded,
            numbers(padded, self.device).view(self.num_rows, longest),
            [len(path) for path in paths],
        )
        self.tree = None

    def _move(
        self, nodes: Sequence[Sequence[int]], nodes_bm: Tensor, counts: Sequence[int]
    ) -> None:
        """Move nodes, told twice, to the first places of the tree; forget what is behind the first ``counts`` of them."""
        first = self.tree.first
        if any(
            list(row[:count]) != list(range(count))
            for row, count in zip(nodes, counts, strict=True)
        ):
            starts = numbers(first, self.device)[:, None]
            move(
                self.memory,
                starts + nodes_bm,
                starts + torch.arange(nodes_bm.size(1), device=self.device),
            )
        for run in self.memory.all_runs():
            run.filled = [
                min(filled, begin) + sum(begin + node < filled for node in row[:count])
                for filled, begin, row, count in zip(run.filled, first, nodes, counts, strict=True)
            ]
        self.lengths = [begin + count for begin, count in zip(first, counts, strict=True)]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, increasing, and forget the others."""
        old, give_back = self.memory, self._give_back
        if give_back is None:
            old.keep(rows)
            self._take(old)
        else:  # what was recorded is of so many rows
            self._take(self._memory(len(rows), old.stops))
            self.memory.take(old, rows)
            give_back()
        self.lengths = [self.lengths[row] for row in rows]

    def _slots(self, starts: Sequence[int], counts: Sequence[int], n: int) -> tuple[Tensor, Tensor]:
        return self.memory.slots(numbers(starts, self.device), numbers(counts, self.device), n)

    def _fill(self, run: LayerSegment) -> None:
        """Run these layers on the tokens that they have not read."""
        memory = self.memory
        while any(filled < length for filled, length in zip(run.filled, self.lengths, strict=True)):
            ends = [
                min(length, filled + PART)
                for filled, length in zip(run.filled, self.lengths, strict=True)
            ]
            counts = [end - filled for end, filled in zip(ends, run.filled, strict=True)]
            n = max(counts)
            in_tree = self.tree is not None and any(
                end > begin for end, begin in zip(ends, self.tree.first, strict=True)
            )
            if (
                memory.passes is not None
                and not in_tree
                and n <= MOST_WIDTH
                and min(run.filled) > 0
            ):
                memory.pass_(run, run.filled, counts)
            elif len(set(run.filled)) == 1 and len(set(ends)) == 1 and not in_tree:
                span = slice(run.filled[0], ends[0])
                memory.read(
                    run,
                    (slice(None), span),
                    Places(
                        memory.cos_cd[None, span], memory.sin_cd[None, span], ends[0], run.filled[0]
                    ),
                )
            else:
                slots, counted = self._slots(run.filled, counts, n)
                places = memory.places(slots, counted, max(ends), self.tree)
                memory.read(run, (places.rows_b1, slots), places)
            run.filled = ends
