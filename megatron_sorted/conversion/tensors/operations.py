"""Invertible operations between one tensor of ours and one or several of Hugging Face's.

``join`` takes theirs one after another, so that no more than one of them and the result are in memory; ``split`` gives them back. Both are
exact: numbers are moved, never computed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_sorted.conversion.tensors.memory import new_tensor

Shape = tuple[int, ...]


class Operation(ABC):
    """How tensors of theirs make up one of ours."""

    @abstractmethod
    def joined_shape(self, shapes: list[Shape]) -> Shape:
        """Return the shape of ours from those of theirs."""

    @abstractmethod
    def join(self, parts: Iterator[torch.Tensor], shape: Shape) -> torch.Tensor:
        """Return ours, of ``shape``."""

    @abstractmethod
    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return theirs, which may be views of ours."""


@dataclass(frozen=True)
class Copy(Operation):
    """The same tensor on both sides."""

    def joined_shape(self, shapes: list[Shape]) -> Shape:
        """Return its shape."""
        return shapes[0]

    def join(self, parts: Iterator[torch.Tensor], shape: Shape) -> torch.Tensor:
        """Return it."""
        return next(parts)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return it."""
        return [tensor]


@dataclass(frozen=True)
class Vocabulary(Copy):
    """A matrix [v, h] with a row for every token; ours may have further rows that pad it for tensor parallelism.

    Padding depends on the layout, and Megatron adds it when it loads.
    """

    vocab_size: int

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of real tokens."""
        return [tensor[: self.vocab_size]]


class Rows(Operation):
    """Tensors whose rows stand in one tensor."""

    def joined_shape(self, shapes: list[Shape]) -> Shape:
        """Return the sum of rows."""
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True)
class QueryKeyValue(Rows):
    """Queries [n*d, ...], keys [g*d, ...] and values [g*d, ...], which Megatron keeps in one tensor [(n + 2g)*d, ...].

    Megatron orders it by group, so that a tensor parallel rank's part is a contiguous slice: for each of the g key/value heads the n/g
    query heads that read it, then its key, then its value.
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
        """Return views [g, heads of a group, d, ...] of the queries, keys and values in a fused tensor."""
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
