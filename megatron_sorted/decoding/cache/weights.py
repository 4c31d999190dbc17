"""What a memory needs to know of the weights that run its passes."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_sorted.settings.rope_scaling import Rope


class Weights(Protocol):
    """The weights of a network in the form that runs it: torch's own, or the compiled library's.

    Attributes:
        layers: Layers from shallow to deep, with num_groups and head_size.
        readouts: Readout of each exit, by depth, with block and adapter.
        embedding: The embedding, [v, h].
        rope: The rotary positions.
        dtype: Data type that stands for the kind of weights.
        state_dtype: Data type of hidden states.
        cache_dtype: Data type of keys and values.
        num_bytes: Size of all weights.
        cache_type: The kind of `BatchCache` whose passes these weights run.
        is_native: Whether the compiled library runs the network.
    """

    layers: Sequence[Any]
    readouts: dict[int, Any]
    embedding: Tensor
    rope: Rope
    dtype: torch.dtype
    state_dtype: torch.dtype
    cache_dtype: torch.dtype
    num_bytes: int
    cache_type: type
    is_native: bool

    def resized(self, vocab_size: int) -> "Weights":
        """Return the weights with a vocabulary padded to another size, which share the layers."""
