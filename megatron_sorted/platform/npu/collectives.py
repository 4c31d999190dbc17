"""Collectives that Megatron hands over together, bucket by bucket: what a CANN that cannot coalesce them needs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


@contextmanager
def one_by_one(
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    async_ops: bool = False,
) -> Iterator[c10d._CoalescingManager]:
    """Stand in for torch's ``_coalescing_manager``: what is called within starts at the end, each call on its own, in their order.

    Args:
        group: None for all processes.
        device: Not asked for: torch's own needs it where a backend has no calls for several tensors.
        async_ops: Whether the caller waits, with the yielded object's ``wait``.

    Raises:
        RuntimeError: One block is inside another of the same group.

    Collective: over ``group``, one of each call made within.
    """
    group = group or dist.group.WORLD
    waiting = (
        c10d._world.pg_coalesce_state
    )  # torch's functions put their calls here as long as the group is in it
    if group in waiting:
        raise RuntimeError(
            "collectives of a group are collected already: this block is inside another of the same group"
        )
    waiting[group] = []
    manager = c10d._CoalescingManager()
    try:
        yield manager
    finally:
        calls = waiting.pop(group)
    for call in calls:
        tensors = (call.tensor,) if call.dst_tensor is None else (call.dst_tensor, call.tensor)
        reduced = {} if call.redop is None else {"op": call.redop}
        manager.append(call.op(*tensors, group=group, async_op=True, **reduced))
    if not async_ops:
        manager.wait()


def take_collectives_apart() -> None:
    """Have Megatron, which must not be imported yet, call collectives of buckets one by one; torch's own batches of messages stay."""
    dist._coalescing_manager = one_by_one
