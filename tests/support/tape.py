"""Graphs without a device: what is recorded is done again operation by operation, on the very memory that it was recorded on.

As in a graph, numbers of the host and addresses are those of the recording, and nothing may ask for a value.
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
        """Returns the work as a list of operations."""
        work()
        self.done = done = []
        with self:
            result = work()
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            tensor.fill_(float("nan"))  # a graph is not run while it is recorded
        return Recording(lambda: self._replay(done), result)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Returns what the operation does, and takes note of it."""
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
