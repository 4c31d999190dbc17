"""Layers that always run together, and their part of the memory of a batch."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_sorted.decoding.cache.layer import KVCache


class LayerSegment:
    """Layers that always run together: from one stop to the next, or an exit's own block.

    Attributes:
        source: Depth of the stop whose hidden states are the input; 0 for the embedding.
        layers: The layers.
        adapter: Adapter before the layers; None without one.
        caches: KV cache of each layer.
        hidden_bch: Output of the last layer in every slot.
        filled: Number of slots that are filled, by row.
    """

    def __init__(
        self,
        source: int,
        layers: Sequence[Any],
        adapter: Any,
        caches: list[KVCache],
        hidden_bch: Tensor,
    ):
        self.source, self.layers, self.adapter = source, list(layers), adapter
        self.caches, self.hidden_bch = caches, hidden_bch
        self.filled = [0] * hidden_bch.size(0)

    def tensors(self) -> list[Tensor]:
        """Return all tensors with a row per text."""
        return [
            self.hidden_bch,
            *(tensor for cache in self.caches for tensor in (cache.keys, cache.values)),
        ]
