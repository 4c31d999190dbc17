"""Copies of a checkpoint's tensors in host memory, so that training continues during writing."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica

from megatron_sorted.platform.contract import Platform


class HostCopies:
    """Host memory for one checkpoint, reused by each save: allocation costs more than copying."""

    def __init__(self, platform: Platform):
        self.platform = platform
        self._buffers: dict[tuple, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Return the size of the memory held, in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    def copy(self, sharded_state: Any) -> None:
        """Replace the tensors that this rank writes by copies in host memory.

        Tensors that another rank writes are left alone: nothing reads them afterwards. The host
        waits for the device.
        """
        used = set()
        for number, sharded in enumerate(nested_values(sharded_state)):
            if not isinstance(sharded, ShardedTensor) or not is_main_replica(sharded.replica_id):
                assert isinstance(sharded, ShardedTensor | ShardedObject), type(sharded)
                continue
            source = sharded.data.detach()
            key = (number, sharded.key, tuple(source.shape), source.dtype)
            if key not in self._buffers:
                self._buffers[key] = self.platform.host_buffer(source)
            sharded.data = self._buffers[key].copy_(source, non_blocking=True)
            used.add(key)
        for key in self._buffers.keys() - used:
            del self._buffers[key]
        self.platform.synchronize()
