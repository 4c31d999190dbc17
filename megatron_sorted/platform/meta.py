"""The platform of dry runs: tensors have shapes but no values, and nothing is sent.

One process takes the place of any rank of a layout of any size, with the real model, Megatron's
real groups and its real schedule. It cannot do anything else afterwards, because CUDA calls stay
redirected.
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
    """Register collectives that torch lacks for tensors without values.

    The registration lasts as long as the returned library.
    """
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
    """The platform of tensors that have shapes but no values."""

    name = "meta"
    backend = "fake"
    host_backend = "fake"

    def prepare(self) -> None:
        """Redirect Megatron's CUDA calls to torch's meta device."""
        redirect_cuda(META)
        _complete_collectives()

    def device(self) -> torch.device:
        """Return torch's meta device."""
        return META

    def reset_peak_memory(self) -> None:
        """Do nothing: no memory is used."""

    def peak_memory_bytes(self) -> int:
        """Return 0."""
        return 0


@contextmanager
def pretended_world(rank: int, world_size: int) -> Iterator[None]:
    """Make this process rank ``rank`` of ``world_size`` within a context; its messages are dropped.

    Collective: none takes place; the groups are torch's fake ones.
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
