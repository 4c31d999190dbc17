"""The memory of a batch of texts whose passes the compiled library runs."""

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sorted.decoding.cache.memory import BatchCache
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
)
from megatron_sorted.decoding.native.weights import NativeReadout
from megatron_sorted.decoding.speculation.tree import DraftTree


class NativeCache(BatchCache):
    """A cache that is filled, and whose logits are computed, by the compiled library.

    The library is given addresses. They stay true: rows that end leave the others where they are
    (see `keep`), and a tensor of this cache is never replaced by one in other memory.
    """

    readouts: dict[int, NativeReadout]

    def __init__(self, weights: Weights, *arguments, **more):
        """Allocate the memory; arguments as for `BatchCache`."""
        super().__init__(weights, *arguments, **more)
        self.library = weights.library
        self._structures: dict[int, CSegment] = {}

    def fill(self, segment: LayerSegment, ends: Sequence[int], tree: DraftTree | None) -> None:
        """Run a segment on the tokens that it has not processed yet; see `BatchCache.fill`."""
        rows, slots, positions = [], [], []
        levels = None if tree is None or not tree.size else tree.levels_bt.tolist()
        for row, (start, end) in enumerate(zip(segment.filled, ends, strict=True)):
            rows += [row] * (end - start)
            slots += range(start, end)
            if levels is None:
                positions += range(start, end)
                continue
            first, size = tree.first[row], tree.size
            positions += (
                first + levels[row][slot - first] - 1 if 0 <= slot - first < size else slot
                for slot in range(start, end)
            )
        numbers = [_integers(values) for values in (rows, slots, positions)]
        places = CPlaces(
            len(rows),
            self.capacity,
            0,
            0,
            *map(ctypes.addressof, numbers),
            self.cos_cd.data_ptr(),
            self.sin_cd.data_ptr(),
        )
        if levels is not None:
            first = _integers(tree.first)
            levels_bt = tree.levels_bt.to(torch.int32).contiguous()
            seen_btt = tree.seen_btt.contiguous()
            places.tree_size, places.tree_first = tree.size, ctypes.addressof(first)
            places.tree_levels, places.tree_seen = levels_bt.data_ptr(), seen_btt.data_ptr()
        self.library.native_run(native_threads(), self._structure(segment), ctypes.byref(places))
        segment.filled = list(ends)

    def logits(self, depth: int, slots_bn: Tensor) -> Tensor:
        """Return the logits [b, n, v] of the exit at ``depth`` in these slots, already filled."""
        readout = self.readouts[depth]
        hidden_bch = (self.blocks.get(depth) or self.segments[depth]).hidden_bch
        b, n = slots_bn.shape
        slots = slots_bn.to(torch.int32).contiguous()
        rows = _integers([row for row in range(b) for _ in range(n)])
        logits = torch.empty(b, n, readout.packed.head.outputs)
        self.library.native_logits(
            native_threads(),
            ctypes.byref(readout.packed),
            hidden_bch.data_ptr(),
            self.capacity,
            b * n,
            ctypes.addressof(rows),
            slots.data_ptr(),
            logits.data_ptr(),
        )
        missing = readout.vocab_size - logits.size(2)
        if missing > 0:
            return F.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, :, : readout.vocab_size]

    def _structure(self, segment: LayerSegment) -> CSegment:
        """Return the library's structure of a segment; it is made once."""
        if id(segment) not in self._structures:
            parts = segment.adapter or []
            source = self.segments[segment.source].hidden_bch.data_ptr() if segment.source else None
            self._structures[id(segment)] = CSegment(
                len(segment.layers),
                segment.hidden_bch.size(2),
                len(parts),
                FLOAT32 if self.embedding.dtype == torch.float32 else BFLOAT16,
                (CLayer * len(segment.layers))(*(layer.packed for layer in segment.layers)),
                (CCache * len(segment.caches))(
                    *((cache.keys.data_ptr(), cache.values.data_ptr()) for cache in segment.caches)
                ),
                (CPart * len(parts))(*parts),
                self.embedding.data_ptr(),
                self.tokens_bc.data_ptr(),
                source,
                segment.hidden_bch.data_ptr(),
                self.embedding.size(0),
            )
        return self._structures[id(segment)]


def _integers(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int32 * len(values))(*values)
