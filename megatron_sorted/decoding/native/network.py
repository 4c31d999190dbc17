"""A network packed for the compiled library, and its passes on a cache."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sorted.conversion.hugging_face.families import attention_window
from megatron_sorted.conversion.hugging_face.nested_exits import NestedExit
from megatron_sorted.decoding.native.library import (
    BFLOAT16,
    FLOAT32,
    CCache,
    CLayer,
    CPart,
    CPlaces,
    CReadout,
    CSegment,
    native_library,
)
from megatron_sorted.decoding.native.weights import Packer
from megatron_sorted.decoding.speculation.tree import DraftTree

KIND_NAMES = {
    torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8",
}  # fmt: skip
"""Names of the kinds of weights, by the data type that chooses them."""


@dataclass(frozen=True)
class NativeLayer:
    """A packed layer.

    Attributes:
        packed: The library's structure.
        num_groups: Number of heads of keys and values.
        head_size: Size of a head.
    """

    packed: CLayer
    num_groups: int
    head_size: int


@dataclass(frozen=True)
class NativeReadout:
    """A packed readout of an exit.

    Attributes:
        packed: The library's structure.
        vocab_size: Number of logits: more than the head has are -inf, fewer are the first ones.
        block: The exit's own layer; None without one.
        adapter: The parts before the block; None without a block.
    """

    packed: CReadout
    vocab_size: int
    block: NativeLayer | None = None
    adapter: list[CPart] | None = None


class NativeNetwork:
    """The packed weights of a model, whose own are freed.

    Attributes:
        layers: The layers, from shallow to deep.
        readouts: The readout of each exit, by depth.
        embedding: The embedding; float32, or bfloat16 for the other kinds.
        kind: Name of the kind of weights.
    """

    def __init__(self, model: nn.Module, exits: dict[int, NestedExit], kind: str):
        """Pack a model and its exits.

        Raises:
            NativeError: The library cannot be built here, or the model has a part that it does not
                know, or weights that are not finite; the model is unchanged then.
        """
        config, self.library, self.kind = model.config, native_library(), kind
        packer = Packer(self.library, kind, torch.get_num_threads())
        self.layers = [
            _layer(packer.layer(layer, attention_window(config, index)))
            for index, layer in enumerate(model.model.layers)
        ]
        embedding = model.get_input_embeddings().weight.detach()
        self.embedding = embedding.to(torch.float32 if kind == "float32" else torch.bfloat16)
        self.readouts = {}
        for depth, own in exits.items():
            packed, block = packer.readout(own, embedding.size(1)), packer.block(own, depth, config)
            layer, parts = (None, None) if block is None else (_layer(block[0]), block[1])
            self.readouts[depth] = NativeReadout(packed, own.head.out_features, layer, parts)
        self._held = packer.held
        for module in [model, *_own_modules(exits)]:
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    part.weight.data = part.weight.data.new_empty(0)
        model.get_input_embeddings().weight.data = self.embedding

    @property
    def num_bytes(self) -> int:
        """Return the size of the packed weights and the embedding."""
        tensors = [*self._held, self.embedding]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def run(
        self, memory, segment, starts: Sequence[int], ends: Sequence[int], tree: DraftTree | None
    ) -> None:
        """Run a segment on the tokens of each row in the slots from ``starts`` to ``ends``.

        Args:
            memory: The batch's cache, a `BatchCache`.
            segment: One of its segments.
            starts, ends: Slots, by row.
            tree: Draft tree behind the texts; None without one.
        """
        rows, slots, positions = [], [], []
        levels = None if tree is None or not tree.size else tree.levels_bt.tolist()
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
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
            memory.capacity,
            0,
            0,
            *(_address(values) for values in numbers),
            memory.cos_cd.data_ptr(),
            memory.sin_cd.data_ptr(),
        )
        if levels is not None:
            branches = (
                _integers(tree.first),
                tree.levels_bt.to(torch.int32).contiguous(),
                tree.seen_btt.contiguous(),
            )
            places.tree_size, places.tree_first = tree.size, _address(branches[0])
            places.tree_levels, places.tree_seen = (branch.data_ptr() for branch in branches[1:])
        self.library.native_run(
            torch.get_num_threads(), self._segment(memory, segment), ctypes.byref(places)
        )

    def _segment(self, memory, segment) -> CSegment:
        """Return the library's structure of a segment; it is made once."""
        if segment.native is None:
            parts = segment.adapter or []
            source = segment.source and memory.segments[segment.source].hidden_bch.data_ptr()
            segment.native = CSegment(
                len(segment.layers),
                segment.hidden_bch.size(2),
                len(parts),
                FLOAT32 if self.embedding.dtype == torch.float32 else BFLOAT16,
                (CLayer * len(segment.layers))(*(layer.packed for layer in segment.layers)),
                (CCache * len(segment.caches))(
                    *((cache.keys.data_ptr(), cache.values.data_ptr()) for cache in segment.caches)
                ),
                (CPart * len(parts))(*parts),
                memory.embedding.data_ptr(),
                memory.tokens_bc.data_ptr(),
                source or None,
                segment.hidden_bch.data_ptr(),
                memory.embedding.size(0),
            )
        return segment.native

    def logits(self, readout: NativeReadout, hidden_bch: Tensor, slots_bn: Tensor) -> Tensor:
        """Return the logits [b, n, v] of an exit's hidden states in these slots."""
        b, n = slots_bn.shape
        slots = slots_bn.to(torch.int32).contiguous()
        rows = _integers([row for row in range(b) for _ in range(n)])
        logits = torch.empty(b, n, readout.packed.head.outputs)
        self.library.native_logits(
            torch.get_num_threads(),
            ctypes.byref(readout.packed),
            hidden_bch.data_ptr(),
            hidden_bch.size(1),
            b * n,
            _address(rows),
            slots.data_ptr(),
            logits.data_ptr(),
        )
        missing = readout.vocab_size - logits.size(2)
        if missing > 0:
            return F.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, :, : readout.vocab_size]

    def resized(self, vocab_size: int) -> dict[int, NativeReadout]:
        """Return the readouts for a vocabulary padded to another size."""
        return {
            depth: replace(readout, vocab_size=vocab_size)
            for depth, readout in self.readouts.items()
        }


def _layer(packed: CLayer) -> NativeLayer:
    return NativeLayer(packed, packed.groups, packed.head_size)


def _own_modules(exits: dict[int, NestedExit]) -> list[nn.Module]:
    """Return the modules of exits."""
    parts = (part for own in exits.values() for part in (own.block, own.norm, own.head))
    return [part for part in parts if part is not None]


def _integers(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int32 * len(values))(*values)


def _address(values: ctypes.Array) -> int:
    return ctypes.addressof(values)
