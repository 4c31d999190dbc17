"""No device at all: tensors have shapes and no values, and groups of any size exist in one process, in which nothing is sent.

For dry runs: the real model, Megatron's real groups and its real schedule on any rank of any layout. Such a process can do nothing else
afterwards, since mentions of CUDA stay redirected.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist

from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.cpu import redirect_cuda

META = torch.device("meta")


@cache
def _complete_collectives() -> torch.library.Library:
    """Return what must be kept so that torch knows, for tensors without values, the collectives it has no kernel for."""
    from torch._C._distributed_c10d import FakeWork

    library = torch.library.Library("c10d", "IMPL")
    for name in (
        "allreduce_coalesced_",
        "reduce_scatter_tensor_coalesced_",
        "allgather_into_tensor_coalesced_",
    ):
        library.impl(name, lambda *_arguments: FakeWork().boxed(), "Meta")
    return library


class MetaPlatform(Platform):
    """Shapes alone."""

    name = "meta"
    backend = "fake"
    host_backend = "fake"

    def prepare(self) -> None:
        """Redirect Megatron's CUDA calls to shapes."""
        redirect_cuda(META)
        _complete_collectives()

    def device(self) -> torch.device:
        """Return the device of shapes."""
        return META

    def reset_peak_memory(self) -> None:
        """Nothing is stored."""

    def peak_memory_bytes(self) -> int:
        """Return 0."""
        return 0


@contextmanager
def pretended_world(rank: int, world_size: int) -> Iterator[None]:
    """Return a context in which this process is rank ``rank`` of ``world_size``, alone: what it sends is dropped.

    Collective: none in truth; the groups are torch's fake ones.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(
        "cpu:fake,meta:fake", rank=rank, world_size=world_size, store=FakeStore()
    )
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
