"""Patches of torch under which unmodified megatron-core runs on torch_npu 2.13.

They are applied once in a process, before Megatron is imported, because Megatron's modules keep
references to torch's functions. Each patch is listed with its reason, and tests/npu/test_patches.py
shows for each what happens without it. Beside an adaptor all of them are applied after it: each
changes nothing where an adaptor did the same, and which of them an adaptor's branch brings is not
assumed. Megatron's compiled functions (its jit_fuser is torch.compile, for which inductor has no
NPU code) need no patch: the fusions that call them are off in model/config.py.
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
class Patch:
    """One patch.

    Attributes:
        name: Name of the patch in tests and messages.
        reason: What fails without it.
        apply: Function that applies it.
    """

    name: str
    reason: str
    apply: Callable[[], None]


def _transfer_names() -> None:
    # it lists all its changes on every rank, and adds a warning filter, which ends here
    with warnings.catch_warnings(record=True):
        from torch_npu.contrib import transfer_to_npu  # noqa: F401  importing it applies it


def _with_cuda_names(method: Callable) -> Callable:
    @functools.wraps(method)
    def type_name(self, dtype=None, *args, **kwargs):
        name = method(self, *(() if dtype is None else (dtype,)), *args, **kwargs)
        return name.replace("torch.npu.", "torch.cuda.") if isinstance(name, str) else name

    return type_name


def _type_names() -> None:
    torch.Tensor.type = _with_cuda_names(torch.Tensor.type)


def _capability() -> None:
    os.environ.setdefault("TORCH_NPU_DEVICE_CAPABILITY", "8.0")


def _exact_all_reduce(all_reduce: Callable) -> Callable:
    @functools.wraps(all_reduce)
    def reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        """Reduce a tensor over ``group``.

        Of a float64 tensor every rank gathers all summands as integers and adds them in rank order.

        Collective: one all-reduce over ``group``; for a float64 tensor one all-gather instead.
        """
        if tensor.dtype != torch.float64 or tensor.device.type != "npu":
            return all_reduce(tensor, op=op, group=group, async_op=async_op)
        assert not async_op, "float64 tensors are reduced synchronously"
        bits = tensor.contiguous().view(torch.int64).reshape(1, -1)
        parts = bits.new_empty(dist.get_world_size(group), bits.size(1))
        dist.all_gather_into_tensor(parts, bits, group=group)
        tensor.copy_(REDUCTIONS[op](parts.view(torch.float64), 0).view_as(tensor))
        return None

    return reduce


def _float64_sums() -> None:
    dist.all_reduce = dist.distributed_c10d.all_reduce = _exact_all_reduce(dist.all_reduce)


PATCHES = (
    Patch(
        "device names",
        'Megatron writes "cuda" and "nccl" on some 350 lines: '
        "AssertionError: Torch not compiled with CUDA enabled",
        _transfer_names,
    ),
    Patch(
        "type names",
        "Megatron's optimizers distinguish dtypes by Tensor.type(), where transfer_to_npu leaves "
        "torch.npu.*: TypeError: Wrapped parameters must be one of torch.cuda.FloatTensor",
        _type_names,
    ),
    Patch(
        "capability",
        "torch.distributed.broadcast reads the major number of the device capability, which is "
        "None: TypeError: 'NoneType' object is not subscriptable",
        _capability,
    ),
    Patch(
        "float64 sums",
        "HCCL has no all-reduce of float64. "
        "MindSpeed's goes through float32, which loses digits of checksums",
        _float64_sums,
    ),
)


def apply_patches(leave_out: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Apply all patches but ``leave_out``; return their names."""
    unknown = leave_out - {patch.name for patch in PATCHES}
    assert not unknown, f"no such patches: {unknown}"
    chosen = [patch for patch in PATCHES if patch.name not in leave_out]
    for patch in chosen:
        patch.apply()
    return tuple(patch.name for patch in chosen)
