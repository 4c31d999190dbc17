"""Collectives that Megatron coalesces, started one by one for versions of CANN that cannot."""

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
    """Replace torch's ``_coalescing_manager``: start the collectives of the block one by one.

    They start at the end of the block, in the order of the calls.

    Args:
        group: The group of the collectives; None for all processes.
        device: Ignored. torch's own function needs it where a backend has no calls for several
            tensors.
        async_ops: Whether the caller waits, with the yielded object's ``wait``.

    Raises:
        RuntimeError: One block is inside another of the same group.

    Collective: over ``group``, each collective called within the block.
    """
    group = group or dist.group.WORLD
    # torch's functions append their calls here while the group is in it
    waiting = c10d._world.pg_coalesce_state
    if group in waiting:
        raise RuntimeError(
            "collectives of a group are collected already: "
            "this block is inside another of the same group"
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
    """Make Megatron start the collectives of its buckets one by one.

    Megatron must not be imported yet. Batches of point-to-point messages stay torch's own.
    """
    dist._coalescing_manager = one_by_one
