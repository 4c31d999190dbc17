"""The memory of a batch of texts whose passes the compiled library runs."""

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sorted.decoding.cache.memory import BatchCache, Fill
from megatron_sorted.decoding.cache.segment import LayerSegment
from megatron_sorted.decoding.cache.weights import Weights
from megatron_sorted.decoding.native.choice import native_threads
from megatron_sorted.decoding.native.library import (
    BFLOAT16,
    FLOAT32,
    CCache,
    CLayer,
    CPart,
    CPlaces,
    CSegment,
    CText,
)
from megatron_sorted.decoding.native.weights import NativeReadout
from megatron_sorted.decoding.speculation.tree import DraftTree


class NativeCache(BatchCache):
    """A cache that is filled, and whose logits are computed, by the compiled library.

    The library is given addresses. They stay true: rows that end leave the others where they are
    (see `keep`), and a tensor of this cache is never replaced by one in other memory.
    """

    readouts: dict[int, NativeReadout]
    # the library reads no slot before it has written it
    allocate = staticmethod(torch.empty)

    def __init__(self, weights: Weights, *arguments, **more):
        """Allocate the memory; arguments as for `BatchCache`."""
        super().__init__(weights, *arguments, **more)
        self.library = weights.library
        self._structures: dict[int, tuple[CSegment, ctypes.Array]] = {}

    @classmethod
    def fill_all(cls, groups: Sequence[Sequence[Fill]]) -> None:
        """Run segments on tokens of many caches, as one call; see `BatchCache.fill_all`."""
        if not groups:
            return
        # the caches' tables of angles begin alike
        widest = max((fill.memory for group in groups for fill in group), key=lambda m: m.capacity)
        segments, places, kept = [], (CPlaces * len(groups))(), []
        for fills, place in zip(groups, places, strict=True):
            lists = _Lists()
            for fill in fills:
                lists.add(fill)
            kept.append(lists)
            segments.append(fills[0].memory._structure(fills[0].segment)[0])
            lists.write(place, widest)
        pointers = (ctypes.c_void_p * len(segments))(*map(ctypes.addressof, segments))
        widest.library.native_run(
            native_threads(), len(segments), ctypes.addressof(pointers), ctypes.addressof(places)
        )
        for fills in groups:
            for fill in fills:
                fill.segment.filled = list(fill.ends)

    def fill(self, segment: LayerSegment, ends: Sequence[int], tree: DraftTree | None) -> None:
        """Run a segment on the tokens that it has not processed yet; see `BatchCache.fill`."""
        self.fill_all([[Fill(self, segment, ends, tree)]])

    @classmethod
    def logits_all(
        cls, depth: int, wanted: Sequence[tuple["NativeCache", Tensor]], joins: bool = True
    ) -> list[Tensor]:
        """Return the logits of the exit at ``depth`` in slots of many caches."""
        readout, addresses = wanted[0][0].readouts[depth], []
        for memory, slots_bn in wanted:
            hidden_bch = (memory.blocks.get(depth) or memory.segments[depth]).hidden_bch
            size = hidden_bch.stride(1) * hidden_bch.element_size()
            for row, slots in enumerate(slots_bn.tolist()):
                start = hidden_bch.data_ptr() + row * memory.capacity * size
                addresses += [start + slot * size for slot in slots]
        library = wanted[0][0].library
        states = (ctypes.c_void_p * len(addresses))(*addresses)
        logits_nv = torch.empty(len(addresses), readout.packed.head.outputs)
        library.native_logits(
            native_threads(),
            ctypes.byref(readout.packed),
            len(addresses),
            ctypes.addressof(states),
            logits_nv.data_ptr(),
        )
        missing = readout.vocab_size - logits_nv.size(1)
        logits_nv = (
            F.pad(logits_nv, (0, missing), value=float("-inf"))
            if missing > 0
            else logits_nv[:, : readout.vocab_size]
        )
        parts = logits_nv.split([slots_bn.numel() for _, slots_bn in wanted])
        return [
            part.view(*slots_bn.shape, -1)
            for part, (_, slots_bn) in zip(parts, wanted, strict=True)
        ]

    def logits(self, depth: int, slots_bn: Tensor) -> Tensor:
        """Return the logits [b, n, v] of the exit at ``depth`` in these slots, already filled."""
        return self.logits_all(depth, [(self, slots_bn)])[0]

    def texts_of(self, segment: LayerSegment) -> ctypes.Array:
        """Return the library's structures of the rows in a segment; they are made once."""
        return self._structure(segment)[1]

    def _structure(self, segment: LayerSegment) -> tuple[CSegment, ctypes.Array]:
        if id(segment) not in self._structures:
            parts = segment.adapter or []
            layers = (CLayer * len(segment.layers))(*(layer.packed for layer in segment.layers))
            made = CSegment(
                len(segment.layers),
                segment.hidden_bch.size(2),
                len(parts),
                FLOAT32 if self.embedding.dtype == torch.float32 else BFLOAT16,
                layers,
                (CPart * len(parts))(*parts),
                self.embedding.data_ptr(),
                self.embedding.size(0),
            )
            source_bch = self.segments[segment.source].hidden_bch if segment.source else None
            texts = (CText * self.num_rows)()
            for row, text in enumerate(texts):
                text.tokens = self.tokens_bc[row].data_ptr()
                text.source = None if source_bch is None else source_bch[row].data_ptr()
                text.target = segment.hidden_bch[row].data_ptr()
                text.caches = (CCache * len(segment.caches))(
                    *(
                        (cache.keys[row].data_ptr(), cache.values[row].data_ptr())
                        for cache in segment.caches
                    )
                )
                text.capacity = self.capacity
            self._structures[id(segment)] = made, texts
        return self._structures[id(segment)]


class _Lists:
    """The new tokens of a segment in many caches, as the library takes them."""

    def __init__(self):
        self.rows: list[int] = []
        self.slots: list[int] = []
        self.positions: list[int] = []
        self.texts: list[CText] = []
        self.held: list = []

    def add(self, fill: Fill) -> None:
        """Append the tokens of a cache that a segment has not processed yet."""
        tree = fill.tree if fill.tree is not None and fill.tree.size else None
        if tree is not None:
            levels_bt = tree.levels_bt.to(torch.int32).contiguous()
            seen_btt = tree.seen_btt.contiguous()
            self.held += [levels_bt, seen_btt]
            levels = levels_bt.tolist()
        texts = fill.memory.texts_of(fill.segment)
        for row, (start, end) in enumerate(zip(fill.segment.filled, fill.ends, strict=True)):
            if end <= start:
                continue
            text = texts[row]
            self.rows += [len(self.texts)] * (end - start)
            self.slots += range(start, end)
            if tree is None:
                self.positions += range(start, end)
            else:
                first, size = tree.first[row], tree.size
                self.positions += (
                    first + levels[row][slot - first] - 1 if 0 <= slot - first < size else slot
                    for slot in range(start, end)
                )
                text = CText.from_buffer_copy(text)
                text.tree_first, text.tree_size = first, size
                text.tree_levels = levels_bt[row].data_ptr()
                text.tree_seen = seen_btt[row].data_ptr()
            self.texts.append(text)

    def write(self, place: CPlaces, widest: NativeCache) -> None:
        """Write the addresses of the lists; they live as long as this object."""
        arrays = [_integers(values) for values in (self.rows, self.slots, self.positions)]
        texts = (CText * len(self.texts))(*self.texts)
        self.held += [*arrays, texts]
        place.count = len(self.rows)
        place.rows, place.slots, place.positions = map(ctypes.addressof, arrays)
        place.cosines, place.sines = widest.cos_cd.data_ptr(), widest.sin_cd.data_ptr()
        place.texts = texts


def _integers(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int32 * len(values))(*values)
