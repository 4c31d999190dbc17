"""The weights of a network packed for the compiled library."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_sorted.conversion.hugging_face.families import attention_window
from megatron_sorted.conversion.hugging_face.nested_exits import NestedExit
from megatron_sorted.conversion.hugging_face.rope_keys import rope_of_transformers
from megatron_sorted.decoding.cache.eager import num_bytes, resized_embedding
from megatron_sorted.decoding.native.cache import NativeCache
from megatron_sorted.decoding.native.choice import native_threads
from megatron_sorted.decoding.native.library import native_library
from megatron_sorted.decoding.native.parts import check_parts
from megatron_sorted.decoding.native.weights import NativeLayer, NativeReadout, Packer
from megatron_sorted.settings.rope_scaling import Rope


@dataclass(frozen=True)
class NativeWeights:
    """The packed weights of a model; see `memory.Weights` for what all kinds have.

    Attributes:
        layers: Layers from shallow to deep.
        readouts: Readout of each exit, by depth.
        embedding: The embedding, [v, h]: float32, or bfloat16 for the other kinds. A head tied to
            it is packed beside it.
        rope: The rotary positions.
        dtype: Data type that stands for the kind of weights.
        num_bytes: Size of the packed weights and the embedding.
        cache_dtype: Data type of keys and values: float32, or bfloat16 for the other kinds.
        held: Tensors whose memory the structures point to.
        library: The library that packed them, and that alone can read them.
    """

    layers: Sequence[NativeLayer]
    readouts: dict[int, NativeReadout]
    embedding: Tensor
    rope: Rope
    dtype: torch.dtype
    num_bytes: int
    cache_dtype: torch.dtype
    held: Sequence[Tensor]
    library: ctypes.CDLL
    cache_type = NativeCache
    is_native = True
    state_dtype = torch.float32

    @classmethod
    def of(
        cls, model: nn.Module, exits: dict[int, NestedExit], kind: str, free: bool = True
    ) -> "NativeWeights":
        """Pack a model and its exits, matrix by matrix.

        Everything is checked first, so that a model that cannot be packed is unchanged.

        Args:
            model: The transformers model.
            exits: Exits by depth.
            kind: Name of the kind of weights, one of `library.KINDS`.
            free: Whether to free each matrix of the model once it is packed.

        Raises:
            NativeError: The library cannot be built here, or the model has a part that it does not
                know, or weights that are not finite.
        """
        config, library = model.config, native_library()
        check_parts(model, exits)
        packer = Packer(library, kind, native_threads(), free)
        # a head may be the same parameter, and is freed when it is packed
        embedding = model.get_input_embeddings().weight.detach()
        layers, readouts = [], {}
        for index, layer in enumerate(model.model.layers):
            layers.append(packer.layer(layer, attention_window(config, index)))
            packer.return_memory()
        for depth, own in exits.items():
            readouts[depth] = packer.readout(own, depth, config)
            packer.return_memory()
        # the head of a model may be no exit's
        packer.release(model.lm_head.weight)
        short = torch.float32 if kind == "float32" else torch.bfloat16
        embedding = embedding.to(short)
        if free:
            model.get_input_embeddings().weight.data = embedding
        packer.return_memory()
        size = sum(map(num_bytes, [*packer.held, embedding]))
        rope, dtype = rope_of_transformers(config), getattr(torch, kind)
        return cls(layers, readouts, embedding, rope, dtype, size, short, packer.held, library)

    def resized(self, vocab_size: int) -> "NativeWeights":
        """Return the weights with a vocabulary padded to another size."""
        readouts = {
            depth: replace(readout, vocab_size=vocab_size)
            for depth, readout in self.readouts.items()
        }
        return replace(
            self, readouts=readouts, embedding=resized_embedding(self.embedding, vocab_size)
        )
