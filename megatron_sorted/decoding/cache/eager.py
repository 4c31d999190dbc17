"""The weights of a network as torch runs them: layers with joined matrices, and exits' readouts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sorted.conversion.hugging_face.families import attention_window
from megatron_sorted.conversion.hugging_face.nested_exits import ExitBlock, ExitNorm, NestedExit
from megatron_sorted.conversion.hugging_face.rope_keys import rope_of_transformers
from megatron_sorted.decoding.cache.layer import Layer
from megatron_sorted.decoding.cache.matrix import Matrices, Matrix
from megatron_sorted.decoding.cache.memory import BatchCache
from megatron_sorted.decoding.cache.norm import RmsNorm
from megatron_sorted.settings.rope_scaling import Rope


@dataclass(frozen=True)
class ExitReadout:
    """The modules that turn the hidden state at an exit into logits.

    Attributes:
        norm: Norm before the head; a module if it holds an MLP or adapter of the exit's own.
        head: Output matrix.
        block: The exit's own layer before the norm, with its own KV cache; None without one.
        adapter: The exit's own adapter before the block; None without one.
    """

    norm: RmsNorm | ExitNorm
    head: Matrix
    block: Layer | None = None
    adapter: nn.Module | None = None

    def logits(self, hidden: Tensor, rows: int | None = None) -> Tensor:
        """Return the logits [..., v] of hidden states [..., h] after the block, if there is one.

        Args:
            hidden: The hidden states.
            rows: Number of rows of every product, see `Matrix`.
        """
        return self.head(self.norm(hidden), rows)

    @property
    def has_plain_products(self) -> bool:
        """Return whether all its products are a `Matrix`'s."""
        return isinstance(self.norm, RmsNorm) and self.adapter is None


@dataclass(frozen=True)
class EagerWeights:
    """The weights of a model, which it shares; see `weights.Weights` for what all kinds have.

    Attributes:
        layers: Layers from shallow to deep.
        readouts: Readout of each exit, by depth.
        embedding: The embedding, [v, h].
        rope: The rotary positions.
        num_bytes: Size of the model's weights and of the packed copies of matrices.
    """

    layers: Sequence[Layer]
    readouts: dict[int, ExitReadout]
    embedding: Tensor
    rope: Rope
    num_bytes: int
    cache_type = BatchCache
    is_native = False

    @classmethod
    def of(cls, model: nn.Module, exits: dict[int, NestedExit], packed: bool) -> "EagerWeights":
        """Join the matrices of a model, which stays usable.

        Args:
            model: The transformers model.
            exits: Exits by depth.
            packed: Whether to keep a copy of each matrix in a format that a CPU reads faster.
        """
        config, matrices = model.config, Matrices(packed)
        layers = [
            Layer(layer, matrices, attention_window(config, index))
            for index, layer in enumerate(model.model.layers)
        ]
        readouts = {
            depth: _make_readout(config, depth, own, matrices) for depth, own in exits.items()
        }
        size = sum(map(num_bytes, distinct_parameters(model, exits))) + matrices.num_packed_bytes
        embedding = model.get_input_embeddings().weight
        return cls(layers, readouts, embedding, rope_of_transformers(config), size)

    @property
    def has_plain_products(self) -> bool:
        """Return whether all products are a `Matrix`'s, so that steps of texts can be joined."""
        return all(readout.has_plain_products for readout in self.readouts.values())

    @property
    def dtype(self) -> torch.dtype:
        """Return the data type of the weights."""
        return self.embedding.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """Return the data type of hidden states."""
        return self.embedding.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """Return the data type of keys and values."""
        return self.embedding.dtype

    def resized(self, vocab_size: int) -> "EagerWeights":
        """Return the weights with a vocabulary padded to another size."""
        heads = {
            id(readout.head): readout.head.resized(vocab_size) for readout in self.readouts.values()
        }
        readouts = {
            depth: replace(readout, head=heads[id(readout.head)])
            for depth, readout in self.readouts.items()
        }
        return replace(
            self, readouts=readouts, embedding=resized_embedding(self.embedding, vocab_size)
        )


def _make_readout(config, depth: int, own: NestedExit, matrices: Matrices) -> ExitReadout:
    """Return the readout of an exit with these modules."""
    head = matrices.of(own.head)
    norm = own.norm if isinstance(own.norm, ExitNorm) else RmsNorm.of(own.norm)
    if own.block is None:
        return ExitReadout(norm, head)
    layer, adapter = parts_of_block(own.block)
    return ExitReadout(norm, head, Layer(layer, matrices, window_of_block(config, depth)), adapter)


def parts_of_block(block: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """Return the layer of an exit's own block, and the adapter before it or None."""
    return (block.layer, block.adapter) if isinstance(block, ExitBlock) else (block, None)


def window_of_block(config, depth: int) -> int | None:
    """Return the attention window of an exit's own block: that of the layer it replaces."""
    return attention_window(config, min(depth, config.num_hidden_layers - 1))


def resized_embedding(embedding: Tensor, vocab_size: int) -> Tensor:
    """Return an embedding with more rows, which are zero, or with the first ones alone."""
    missing = vocab_size - embedding.size(0)
    return F.pad(embedding, (0, 0, 0, missing)) if missing > 0 else embedding[:vocab_size]


def distinct_parameters(model: nn.Module, exits: dict[int, NestedExit]) -> list[nn.Parameter]:
    """Return the parameters of a model and its exits, each once."""
    parts = [part for own in exits.values() for part in (own.block, own.norm, own.head)]
    parameters = {
        id(parameter): parameter
        for module in (model, *parts)
        if module is not None
        for parameter in module.parameters()
    }
    return list(parameters.values())


def num_bytes(tensor: Tensor) -> int:
    """Return the size of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()
