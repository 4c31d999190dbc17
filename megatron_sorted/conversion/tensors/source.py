"""The interface of every source of weights: names, shapes, and tensors read one at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorInfo:
    """Shape and data type of one stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorSource(ABC):
    """Named tensors on disk.

    A source of Megatron weights uses the global names of a sharded checkpoint with the layer's
    index (from 0) after ``decoder.layers.``, such as
    ``decoder.layers.3.self_attention.linear_qkv.weight``, and returns whole tensors, whatever
    layout they were saved in.

    Attributes:
        tensors: Shapes and data types by name, in the order in which they are read fastest.
    """

    tensors: Mapping[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own on the CPU, and keep nothing else in memory.

        Raises:
            CheckpointError: The tensor cannot be read, or is damaged.
        """


class Overlay(TensorSource):
    """The tensors of a source, and further ones.

    Attributes:
        extra: {name: (shape and data type, function that reads it)} of the further tensors.
    """

    def __init__(
        self,
        source: TensorSource,
        extra: Mapping[str, tuple[TensorInfo, Callable[[], torch.Tensor]]],
    ):
        self.source, self.extra = source, extra
        self.tensors = {**source.tensors, **{name: info for name, (info, _) in extra.items()}}

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own."""
        return self.extra[name][1]() if name in self.extra else self.source.read(name)
