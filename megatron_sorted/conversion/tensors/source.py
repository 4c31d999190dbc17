"""What every directory of weights looks like to a conversion: names with shapes, and tensors read one at a time."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorInfo:
    """Shape and kind of one stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Return its size."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorSource(ABC):
    """Named tensors on disk.

    A source of Megatron weights uses the global names of a sharded checkpoint with the layer's index (from 0) after ``decoder.layers.``,
    such as ``decoder.layers.3.self_attention.linear_qkv.weight``, and returns whole tensors, whatever layout they were saved in.

    Attributes:
        tensors: What there is, by name, in the order in which it is best read.
    """

    tensors: Mapping[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in memory of its own, on the CPU; nothing else stays in memory.

        Raises:
            CheckpointError: It cannot be read, or is damaged.
        """


class Renamed(TensorSource):
    """The tensors of a source, some of them under a second name too."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]):
        """Args: ``names`` gives the source's name of a tensor by its second one."""
        self.source, self.names = source, names
        self.tensors = {
            **source.tensors,
            **{name: source.tensors[old] for name, old in names.items()},
        }

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in memory of its own."""
        return self.source.read(self.names.get(name, name))
