"""Test bodies of tests/ranks/test_npu_collectives.py."""

import os

import torch
import torch.distributed as dist

from megatron_sorted.platform.npu.collectives import one_by_one
from tests.support.tiny import init_method


def _collect(rank: int, later: bool) -> tuple[list[torch.Tensor], ...]:
    """Return sums, gathered and scattered tensors of two buckets."""
    made = [torch.tensor([0.0, 1.0]) + rank + 10 * bucket for bucket in range(2)]
    sums = [x.clone() for x in made]
    gathered, scattered = ([torch.empty(size) for _ in made] for size in (4, 1))
    for call, tensors in (
        (dist.all_reduce, [(x,) for x in sums]),
        (dist.all_gather_into_tensor, list(zip(gathered, made, strict=True))),
        (dist.reduce_scatter_tensor, list(zip(scattered, made, strict=True))),
    ):
        with one_by_one(dist.group.WORLD, async_ops=later) as manager:
            for each in tensors:
                call(*each, async_op=later)
        if later:
            manager.wait()
    return sums, gathered, scattered


def collected() -> dict:
    """Return the results of two ranks' blocks, and the coalesced calls that torch got."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=init_method(), rank=rank, world_size=2)
    coalesced = []
    for name in [name for name in dir(dist.ProcessGroup) if name.endswith("_coalesced")]:
        setattr(dist.ProcessGroup, name, lambda *_, name=name: coalesced.append(name))
    report = {
        "at once": _collect(rank, False),
        "later": _collect(rank, True),
        "coalesced": coalesced,
    }
    untouched = torch.ones(2)
    try:
        with one_by_one():
            dist.all_reduce(untouched)
            report["made while collecting"] = int(untouched.sum() != 2)
            with one_by_one():
                pass
    except RuntimeError as error:
        report["nested"] = str(error)
    again = torch.tensor([0.0, 1.0]) + rank
    dist.all_reduce(again)
    report["after an error"] = again.tolist()
    dist.destroy_process_group()
    return report
