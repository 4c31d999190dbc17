"""Counts of what passes torch's dispatcher: operations of matrix products, and messages."""

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
"""Collectives -> how often their larger tensor passes a ring, less one rank's part."""


class Counter(TorchDispatchMode):
    """A counter of operations, bytes of collectives and shapes of messages.

    Operations follow the formulas of torch's FlopCounterMode, which itself cannot be used: it
    follows modules by hooks that refuse ``torch.autograd.grad`` within backward, as exits use it.

    Attributes:
        flops: Number of operations; a multiply-add counts 2.
        sent, received: Messages in order, by the other rank.
        collective_bytes: Bytes that a rank sends if the group is a ring, by (ranks of the group,
            whether tensors were gathered rather than summed).
    """

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.sent: dict[int, list[Message]] = defaultdict(list)
        self.received: dict[int, list[Message]] = defaultdict(list)
        self.collective_bytes: dict[tuple[tuple[int, ...], bool], float] = defaultdict(float)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count an operation and return its result."""
        kwargs = kwargs or {}
        if function.namespace == "c10d":
            self._count_communication(function._schema.name.split("::")[1], args)
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # the host reads a number without a value: whether there are trained tokens
        packet = function._overloadpacket
        out = function(*args, **kwargs)
        in_place = packet is torch.ops.aten.addmm_
        formula = flop_registry.get(torch.ops.aten.addmm if in_place else packet)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _count_communication(self, name: str, args: tuple) -> None:
        objects = (arg for arg in args if isinstance(arg, torch.ScriptObject))
        group = next(each for each in objects if "ProcessGroup" in str(each._type()))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        tensors = _tensors(args)
        if name in ("send", "recv_"):
            [tensor] = tensors
            peer = ranks[next(arg for arg in args if isinstance(arg, int))]
            messages = self.sent if name == "send" else self.received
            messages[peer].append(Message(tuple(tensor.shape), tensor.dtype))
        elif name in SHARES and len(ranks) > 1:
            largest = max(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
            sent = SHARES[name] * largest * (len(ranks) - 1) / len(ranks)
            self.collective_bytes[ranks, "gather" in name] += sent


def _tensors(value: object) -> list[torch.Tensor]:
    """Return all tensors in nested lists and tuples."""
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []
