"""What must be mended from outside so that unmodified megatron-core 0.16.1 runs on torch_npu 2.13.

All of it is done once in a process, before Megatron is imported: Megatron's modules keep what they found when they were. Each mend is
listed with its reason, and tests/npu/test_mends.py shows for each what happens without it. Megatron's functions that are compiled
(its jit_fuser is torch.compile, for which inductor has no NPU code) need none: the fusions that call them are off in model/config.py.
"""

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

REDUCTIONS = {
    dist.ReduceOp.SUM: torch.sum,
    dist.ReduceOp.MAX: torch.amax,
    dist.ReduceOp.MIN: torch.amin,
}


@dataclass(frozen=True)
class Mend:
    """One mend.

    Attributes:
        name: What it is called in tests and messages.
        reason: What goes wrong without it.
        apply: Does it.
        adaptor_has_it: Whether MindSpeed's adaptor brings its own, so that ours is left out beside it.
    """

    name: str
    reason: str
    apply: Callable[[], None]
    adaptor_has_it: bool = False


def _transfer_names() -> None:
    with warnings.catch_warnings(
        record=True
    ):  # it lists all it does on every rank, and adds a filter of its own, which ends here
        from torch_npu.contrib import transfer_to_npu  # noqa: F401  importing it is what does it


def _say_cuda(method: Callable) -> Callable:
    @functools.wraps(method)
    def type_name(self, dtype=None, *args, **kwargs):
        said = method(self, *(() if dtype is None else (dtype,)), *args, **kwargs)
        return said.replace("torch.npu.", "torch.cuda.") if isinstance(said, str) else said

    return type_name


def _type_names() -> None:
    torch.Tensor.type = _say_cuda(torch.Tensor.type)


def _capability() -> None:
    os.environ.setdefault("TORCH_NPU_DEVICE_CAPABILITY", "8.0")


def _exact_all_reduce(all_reduce: Callable) -> Callable:
    @functools.wraps(all_reduce)
    def reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        """Reduce a tensor; of float64 every rank gets all parts as integers and adds them itself, in rank order.

        Collective: one all-reduce over ``group``; of a float64 tensor one all-gather of it.
        """
        if tensor.dtype != torch.float64 or tensor.device.type != "npu":
            return all_reduce(tensor, op=op, group=group, async_op=async_op)
        assert not async_op, "sums in float64 are small and waited for"
        bits = tensor.contiguous().view(torch.int64).reshape(1, -1)
        parts = bits.new_empty(dist.get_world_size(group), bits.size(1))
        dist.all_gather_into_tensor(parts, bits, group=group)
        tensor.copy_(REDUCTIONS[op](parts.view(torch.float64), 0).view_as(tensor))
        return None

    return reduce


def _float64_sums() -> None:
    dist.all_reduce = dist.distributed_c10d.all_reduce = _exact_all_reduce(dist.all_reduce)


MENDS = (
    Mend(
        "device names",
        'Megatron writes "cuda" and "nccl" on some 350 lines: AssertionError: Torch not compiled with CUDA enabled',
        _transfer_names,
    ),
    Mend(
        "type names",
        "Megatron's optimizers tell dtypes apart by Tensor.type(), where transfer_to_npu leaves torch.npu.*: "
        "TypeError: Wrapped parameters must be one of torch.cuda.FloatTensor",
        _type_names,
        adaptor_has_it=True,
    ),
    Mend(
        "capability",
        "torch.distributed.broadcast asks for the major number of the device capability, which is None: "
        "TypeError: 'NoneType' object is not subscriptable",
        _capability,
        adaptor_has_it=True,
    ),
    Mend(
        "float64 sums",
        "HCCL has no all-reduce of float64. MindSpeed's goes through float32, which loses digits of checksums",
        _float64_sums,
    ),
)


def apply_mends(
    leave_out: frozenset[str] = frozenset(), beside_adaptor: bool = False
) -> tuple[str, ...]:
    """Return the names of the mends that were applied: all but ``leave_out`` and those an adaptor brings."""
    unknown = leave_out - {mend.name for mend in MENDS}
    assert not unknown, f"no such mends: {unknown}"
    chosen = [
        mend
        for mend in MENDS
        if mend.name not in leave_out and not (beside_adaptor and mend.adaptor_has_it)
    ]
    for mend in chosen:
        mend.apply()
    return tuple(mend.name for mend in chosen)
