"""What a batch of texts is read into: tokens, keys and values of every layer, hidden states at every stop; and how a pass reads.

Nothing here knows how far a text is; `state` does. A pass can be told on the device where its tokens stand: then none of its numbers come
from the host, its shapes are few and its memory stays where it is, so it can be recorded and replayed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sorted.decoding.cache.layer import Keys, Layer
from megatron_sorted.decoding.cache.passes import Passes
from megatron_sorted.decoding.cache.places import Places, rotation_tables
from megatron_sorted.decoding.cache.transfer import numbers, set_numbers
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.speculation.tree import DraftTree

MOST_WIDTH = 65
"""Tokens of a row that a replayed pass reads at most: the longest draft and the token before it."""
LEAST_SPAN = 128
"""A replayed pass looks at the first 128 slots, or 256, 512 and so on."""
MOST_IDLE = 4
MOST_IDLE_BYTES = 4 << 30
"""How many memories, and how large together, a network keeps while nobody uses them."""


class LayerSegment:
    """Layers that are always run together: from one stop to the next, or an exit's own block.

    Attributes:
        source: Stop whose hidden states it reads; 0 for the embedding.
        layers: Its layers.
        adapter: Before them; or None.
        caches: Their keys and values.
        hidden_bch: What it says of every slot.
        filled: By row, how many slots it has read.
    """

    def __init__(
        self, source: int, layers: Sequence[Layer], adapter, caches: list[Keys], hidden_bch: Tensor
    ):
        self.source, self.layers, self.adapter, self.caches, self.hidden_bch = (
            source,
            list(layers),
            adapter,
            caches,
            hidden_bch,
        )
        self.filled = [0] * hidden_bch.size(0)

    def tensors(self) -> list[Tensor]:
        """Return all that it keeps by row."""
        return [
            self.hidden_bch,
            *(tensor for cache in self.caches for tensor in (cache.keys, cache.values)),
        ]


class Memory:
    """See the module.

    Args:
        network: What reads.
        num_rows: Texts.
        capacity: Slots of a text; the last takes what is written for nobody.
        stops: Depths at which reading may stop.
        passes: Replays those that are told on the device where their tokens stand; None where all are told by the host.
    """

    def __init__(
        self,
        network: Network,
        num_rows: int,
        capacity: int,
        stops: Sequence[int],
        passes: Passes | None = None,
    ):
        self.num_rows, self.capacity, self.stops, self.passes = (
            num_rows,
            capacity,
            tuple(sorted(set(stops))),
            passes,
        )
        self.embedding, self.readers = network.embedding, network.readers
        self.tokens_bc = torch.zeros(num_rows, capacity, dtype=torch.long, device=network.device)
        self.cos_cd, self.sin_cd = rotation_tables(
            network.rotary, capacity, network.dtype, network.device
        )
        self.runs: dict[int, LayerSegment] = {}
        self.blocks: dict[int, LayerSegment] = {}
        low = 0
        for stop in self.stops:
            self.runs[stop] = self._make_run(low, network.layers[low:stop])
            reader = network.readers.get(stop)
            if reader is not None and reader.block is not None:
                self.blocks[stop] = self._make_run(stop, [reader.block], reader.adapter)
            low = stop
        if passes is not None:
            self._starts_b, self._counts_b = (
                torch.zeros(num_rows, dtype=torch.long, device=network.device) for _ in range(2)
            )
            self._slots_bn = torch.zeros(
                num_rows, MOST_WIDTH, dtype=torch.long, device=network.device
            )
            self._counts: list[int] = []

    def _make_run(self, source: int, layers: Sequence[Layer], adapter=None) -> LayerSegment:
        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self.embedding.dtype, device=self.device)

        caches = [
            Keys(
                *(
                    empty(self.num_rows, layer.num_groups, self.capacity, layer.head_size)
                    for _ in range(2)
                )
            )
            for layer in layers
        ]
        return LayerSegment(
            source,
            layers,
            adapter,
            caches,
            empty(self.num_rows, self.capacity, self.embedding.size(1)),
        )

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.tokens_bc.device

    def all_runs(self) -> list[LayerSegment]:
        """Return the runs, those of blocks last."""
        return [*self.runs.values(), *self.blocks.values()]

    def tensors(self) -> list[Tensor]:
        """Return all that is kept by row."""
        return [self.tokens_bc, *(tensor for run in self.all_runs() for tensor in run.tensors())]

    @property
    def num_bytes(self) -> int:
        """Return how large it is."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def clear(self) -> None:
        """Forget all texts; keys that are not numbers would go on to harm those who do not see them."""
        for tensor in self.tensors():
            tensor.zero_()
        for run in self.all_runs():
            run.filled = [0] * self.num_rows

    def take(self, other: "Memory", rows: Sequence[int]) -> None:
        """Take over these rows of a memory with the same stops."""
        index = numbers(rows, self.device)
        with torch.no_grad():
            for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
                torch.index_select(theirs, 0, index, out=mine)
        for mine, theirs in zip(self.all_runs(), other.all_runs(), strict=True):
            mine.filled = [theirs.filled[row] for row in rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, increasing, and forget the others; nothing is asked for: a second memory may not fit beside the first."""
        assert list(rows) == sorted(set(rows))
        with torch.no_grad():
            for tensor in self.tensors():
                for new, old in enumerate(rows):
                    if new != old:
                        tensor[new] = tensor[old]
        self.num_rows, self.tokens_bc = len(rows), self.tokens_bc[: len(rows)]
        for run in self.all_runs():
            run.hidden_bch, run.filled = (
                run.hidden_bch[: len(rows)],
                [run.filled[row] for row in rows],
            )
            run.caches = [
                Keys(cache.keys[: len(rows)], cache.values[: len(rows)]) for cache in run.caches
            ]

    def read(self, run: LayerSegment, at: tuple, places: Places) -> None:
        """Run layers on the tokens of the slots ``at``, which stand at ``places``."""
        hidden = (
            F.embedding(self.tokens_bc[at], self.embedding)
            if run.source == 0
            else self.runs[run.source].hidden_bch[at]
        )
        if run.adapter is not None:
            hidden = run.adapter(hidden)
        for layer, cache in zip(run.layers, run.caches, strict=True):
            hidden = layer(hidden, places, cache)
        run.hidden_bch[at] = hidden

    def logits(self, depth: int, slots_bn: Tensor) -> Tensor:
        """Return the logits [b, n, v] of the exit at ``depth`` after the tokens at these slots, which it has read."""
        hidden = (self.blocks.get(depth) or self.runs[depth]).hidden_bch
        return self.readers[depth].logits(
            hidden.gather(1, slots_bn[:, :, None].expand(-1, -1, hidden.size(2)))
        )

    def slots(self, starts_b: Tensor, counts_b: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return n slots of each row from its start on, and which of them count; the others are the last slot, which is nobody's."""
        step = torch.arange(n, device=self.device)
        left_out = step >= counts_b[:, None]
        return (starts_b[:, None] + step).masked_fill(left_out, self.capacity - 1), ~left_out

    def rows(self) -> Tensor:
        """Return the rows [b, 1]."""
        return torch.arange(self.num_rows, device=self.device)[:, None]

    def places(
        self, slots_bn: Tensor, counted_bn: Tensor, span: int, tree: DraftTree | None = None
    ) -> Places:
        """Return places of rows that do not stand alike, or in a tree, or whose slots are known to the device only."""
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
        seen = torch.where(
            counted_bn[:, :, None], seen, keys == 0
        )  # nobody must see something, or the softmax is of nothing
        positions = positions.clamp(max=self.capacity - 1)
        return Places(
            self.cos_cd[positions],
            self.sin_cd[positions],
            span,
            None,
            self.rows(),
            slots_bn,
            positions,
            key_positions,
            seen,
        )

    def pass_(self, run: LayerSegment, starts: Sequence[int], counts: Sequence[int]) -> None:
        """Run layers on ``counts`` tokens of each row from its start on, told on the device where they stand."""
        n, end = (
            max(counts),
            max(start + count for start, count in zip(starts, counts, strict=True)),
        )
        span = min(max(LEAST_SPAN, 1 << (end - 1).bit_length()), self.capacity)
        set_numbers(self._starts_b, starts)
        if list(counts) != self._counts:
            set_numbers(self._counts_b, counts)
            self._counts = list(counts)

        def work() -> None:
            slots, counted = self.slots(self._starts_b, self._counts_b, n)
            places = self.places(slots, counted, span)
            self.read(run, (places.rows_b1, slots), places)

        self.passes((run, n, span), work)

    def pass_logits(self, depth: int, slots_bn: Tensor) -> Tensor:
        """Return what `logits` does, valid until the same exit is asked again."""
        static = self._slots_bn[:, : slots_bn.size(1)]
        static.copy_(slots_bn)
        return self.passes((depth, slots_bn.size(1)), lambda: self.logits(depth, static))


def move(memory: Memory, sources_bm: Tensor, targets_bm: Tensor) -> None:
    """Copy the tokens in some slots of each row, and what was read of them, to others."""
    rows = memory.rows()
    memory.tokens_bc[rows, targets_bm] = memory.tokens_bc[rows, sources_bm]
    for run in memory.all_runs():
        run.hidden_bch[rows, targets_bm] = run.hidden_bch[rows, sources_bm]
        for cache in run.caches:
            cache.keys[rows, :, targets_bm] = cache.keys[rows, :, sources_bm]
            cache.values[rows, :, targets_bm] = cache.values[rows, :, sources_bm]


def lend(network: Network, num_rows: int, capacity: int, stops: Sequence[int]) -> Memory:
    """Return memory without texts of at least this capacity, which nobody else has.

    Capacities are powers of two, so that texts of other lengths fit as well.
    """
    wanted = num_rows, max(LEAST_SPAN, 1 << (capacity - 1).bit_length()), tuple(sorted(set(stops)))
    for memory in reversed(network.idle):
        if (memory.num_rows, memory.capacity, memory.stops) == wanted:
            network.idle.remove(memory)
            memory.clear()
            return memory
    try:
        return _make(network, *wanted)
    except torch.OutOfMemoryError:
        network.idle.clear()
    return _make(network, *wanted)


def take_back(network: Network, memory: Memory) -> None:
    """Keep memory for the next borrower, unless too much is idle; what has been idle longest goes first."""
    network.idle.append(memory)
    while (
        len(network.idle) > MOST_IDLE
        or sum(one.num_bytes for one in network.idle) > MOST_IDLE_BYTES
    ):
        del network.idle[0]


def _make(network: Network, num_rows: int, capacity: int, stops: Sequence[int]) -> Memory:
    with torch.inference_mode(False):  # what is made within may not be written without
        return Memory(
            network,
            num_rows,
            capacity,
            stops,
            Passes(network.make_recorder() if network.make_recorder else None),
        )
