"""Graphs without a device: recorded operations are repeated one by one, on the same memory.

As in a graph, host numbers and addresses are those of the recording, and no value may be read.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sorted.platform.graphs import Recording

ASKING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "item")


class Tape(TorchDispatchMode):
    """A recorder (`Record`) of the CPU's."""

    def __call__(self, work: Callable[[], Any]) -> Recording:
        """Return the work as a list of operations."""
        work()
        self.done = done = []
        with self:
            result = work()
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            tensor.fill_(float("nan"))  # a graph is not run while it is recorded
        return Recording(lambda: self._replay(done), result)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, record it and return its result."""
        if any(word in func.__name__ for word in ASKING):
            raise RuntimeError(f"{func.__name__} asks the device")
        result = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, result))
        return result

    @staticmethod
    def _replay(done: list[tuple]) -> None:
        for func, args, kwargs, result in done:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
