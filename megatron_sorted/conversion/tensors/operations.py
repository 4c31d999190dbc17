"""Invertible operations between one tensor of ours and one or several of Hugging Face's.

``join`` takes theirs one after another, so that no more than one of them and the result are in
memory; ``split`` is the inverse. Both are exact: numbers are moved, never computed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_sorted.conversion.tensors.memory import new_tensor

Shape = tuple[int, ...]


class Operation(ABC):
    """A relation between one tensor of ours and one or several of Hugging Face's (theirs)."""

    @abstractmethod
    def joined_shape(self, shapes: list[Shape]) -> Shape:
        """Return the shape of our tensor from the shapes of theirs."""

    @abstractmethod
    def join(self, parts: Iterator[torch.Tensor], shape: Shape) -> torch.Tensor:
        """Return our tensor, of ``shape``, from theirs."""

    @abstractmethod
    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return their tensors, which may be views of ours."""


@dataclass(frozen=True)
class Copy(Operation):
    """The same tensor on both sides."""

    def joined_shape(self, shapes: list[Shape]) -> Shape:
        """Return the shape of the tensor."""
        return shapes[0]

    def join(self, parts: Iterator[torch.Tensor], shape: Shape) -> torch.Tensor:
        """Return the tensor itself."""
        return next(parts)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensor itself."""
        return [tensor]


@dataclass(frozen=True)
class Vocabulary(Copy):
    """A matrix [v, h] with a row for every token; ours may have padding rows below.

    Padding depends on the tensor parallel size, and Megatron adds it when it loads.
    """

    vocab_size: int

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of real tokens."""
        return [tensor[: self.vocab_size]]


class Rows(Operation):
    """Tensors whose rows are joined in one tensor."""

    def joined_shape(self, shapes: list[Shape]) -> Shape:
        """Return the shape with the sum of their rows."""
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True)
class QueryKeyValue(Rows):
    """Queries, keys and values that are joined in one tensor.

    Queries [n*d, ...], keys [g*d, ...] and values [g*d, ...] form one tensor [(n + 2g)*d, ...].
    Megatron orders its rows by group, so that a tensor parallel rank's shard is a contiguous slice:
    for each of the g key/value heads the n/g query heads that use it, then its key, then its value.
    """

    num_heads: int
    num_groups: int

    def join(self, parts: Iterator[torch.Tensor], shape: Shape) -> torch.Tensor:
        """Return the fused tensor."""
        fused, views = None, []
        for place, part in enumerate(parts):
            if fused is None:
                fused = new_tensor(shape, part.dtype)
                views = self._views(fused)
            views[place].copy_(part.view(views[place].shape))
        return fused

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return queries, keys and values."""
        return [view.reshape(-1, *tensor.shape[1:]) for view in self._views(tensor)]

    def _views(self, fused: torch.Tensor) -> list[torch.Tensor]:
        """Return views [g, heads of a group, d, ...] of the fused queries, keys and values."""
        queries = self.num_heads // self.num_groups
        grouped = fused.view(self.num_groups, queries + 2, -1, *fused.shape[1:])
        return [grouped[:, :queries], grouped[:, queries:-1], grouped[:, -1:]]


@dataclass(frozen=True)
class Stack(Rows):
    """Matrices one below another: the gate and up projections of a SwiGLU MLP."""

    def join(self, parts: Iterator[torch.Tensor], shape: Shape) -> torch.Tensor:
        """Return the stacked tensor."""
        stacked, row = None, 0
        for part in parts:
            if stacked is None:
                stacked = new_tensor(shape, part.dtype)
            stacked[row : row + part.shape[0]] = part
            row += part.shape[0]
        return stacked

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the two halves."""
        return list(tensor.chunk(2))
