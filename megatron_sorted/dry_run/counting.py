"""Counts what passes torch's dispatcher: operations of matrix products, and what is sent."""

import math
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Message(NamedTuple):
    """One tensor sent from one rank to another."""

    shape: tuple[int, ...]
    dtype: torch.dtype


SHARES = {
    "allreduce_": 2,
    "_allgather_base_": 1,
    "allgather_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "allreduce_coalesced_": 2,
    "reduce_scatter_tensor_coalesced_": 1,
    "allgather_into_tensor_coalesced_": 1,
}
"""Collectives, and how often their larger tensor goes round a ring, less one rank's part."""


class Counter(TorchDispatchMode):
    """Counts operations by the formulas of torch's FlopCounterMode, bytes of collectives, and keeps shapes of messages.

    FlopCounterMode itself cannot be used: it follows modules by hooks that refuse ``torch.autograd.grad`` within backward, by which exits
    are computed.

    Attributes:
        flops: Operations, a multiply-add counting 2.
        sent, received: {rank: messages, in order}.
        collective_bytes: {(ranks of the group, whether tensors were gathered, not summed): bytes that a rank sends if the group is a
            ring}.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.sent: dict[int, list[Message]] = defaultdict(list)
        self.received: dict[int, list[Message]] = defaultdict(list)
        self.collective_bytes: dict[tuple[tuple[int, ...], bool], float] = defaultdict(float)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Return what the operation returns, counted."""
        kwargs = kwargs or {}
        if function.namespace == "c10d":
            self._communication(function._schema.name.split("::")[1], args)
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # a number that the host wants to know and that no one has: trained tokens, whether there are any
        packet = function._overloadpacket
        out = function(*args, **kwargs)
        formula = flop_registry.get(
            torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet
        )
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _communication(self, name: str, args: tuple) -> None:
        objects = (arg for arg in args if isinstance(arg, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(
            next(each for each in objects if "ProcessGroup" in str(each._type()))
        )
        ranks = tuple(dist.get_process_group_ranks(group))
        tensors = [
            tensor for arg in args if isinstance(arg, list | tuple) for tensor in _tensors(arg)
        ]
        tensors += [arg for arg in args if isinstance(arg, torch.Tensor)]
        if name in ("send", "recv_"):
            [tensor] = tensors
            peer = ranks[next(arg for arg in args if isinstance(arg, int))]
            (self.sent if name == "send" else self.received)[peer].append(
                Message(tuple(tensor.shape), tensor.dtype)
            )
        elif name in SHARES and len(ranks) > 1:
            largest = max(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
            self.collective_bytes[ranks, "gather" in name] += (
                SHARES[name] * largest * (len(ranks) - 1) / len(ranks)
            )


def _tensors(arg) -> list[torch.Tensor]:
    if isinstance(arg, torch.Tensor):
        return [arg]
    return (
        [tensor for part in arg for tensor in _tensors(part)]
        if isinstance(arg, list | tuple)
        else []
    )
