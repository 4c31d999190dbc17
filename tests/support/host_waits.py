"""Finds the places where the host would wait for a device, without having one.

On the CPU nothing waits, so device and host tensors are distinguished by their origin. On the
device are results of ``Platform.to_device``, parameters, gradient buffers, tensors created with
``device=``, and whatever is computed from them. To read a number from such a tensor would wait; so
would a shape that depends on its values, copying a number from the host other than through
``to_device`` (as indexing by a list does), and writing a number to places that a tensor names.
"""

import traceback
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_sorted
from megatron_sorted.platform.cpu import CpuPlatform

OURS = str(Path(megatron_sorted.__file__).parent)
STAND_IN = str(Path(OURS) / "platform" / "cpu.py")  # answers Megatron's calls for a device
TO_HOST = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "to",
    "type_as",
}
SHAPE_BY_VALUE = {"nonzero", "unique", "masked_select", "argwhere", "bincount", "repeat_interleave"}
FROM_HOST = {"tensor", "as_tensor", "from_numpy"}


class MarkedPlatform(CpuPlatform):
    """The CPU, where a copy to the device is remembered as the device's."""

    def __init__(self, waits: "HostWaits"):
        self.waits = waits

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy that counts as lying on the device."""
        moved = tensor.clone()
        self.waits.mark(moved)
        return moved


class HostWaits:
    """A recorder of waits as (function of torch, innermost line of megatron_sorted or megatron).

    ``found`` holds those whose innermost caller outside torch is in megatron_sorted, ``megatrons``
    all others.
    """

    def __init__(self):
        self.storages: dict[
            int, torch.UntypedStorage
        ] = {}  # kept alive, so that no address is used again
        self.ours: list[tuple[str, str]] = []
        self.megatrons: list[tuple[str, str]] = []
        self._modes = (_Spread(self), _Calls(self))

    def mark(self, *tensors: torch.Tensor) -> None:
        """Record that tensors lie on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.storages[storage._cdata if storage.data_ptr() == 0 else storage.data_ptr()] = (
                storage
            )

    def marked(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies on the device."""
        storage = tensor.untyped_storage()
        return (storage._cdata if storage.data_ptr() == 0 else storage.data_ptr()) in self.storages

    def __enter__(self) -> "HostWaits":
        self._run_backward = torch.autograd._engine_run_backward
        # torch leaves the mode when it starts a backward pass
        torch.autograd._engine_run_backward = self._backward
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *reason) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*reason)
        torch.autograd._engine_run_backward = self._run_backward

    def _backward(self, *args, **kwargs):
        with self._modes[1]:
            return self._run_backward(*args, **kwargs)

    def note(self, name: str) -> None:
        """Record a wait, by the innermost line outside torch and the stand-in for a device."""
        stack = traceback.extract_stack()[:-2]
        if name == "to" and stack[-1].filename.endswith("torch/nn/utils/clip_grad.py"):
            return  # norms of gradients, gathered on the device where they lie
        for frame in reversed(stack):
            if frame.filename == STAND_IN:
                continue
            if (
                frame.filename.startswith(OURS)
                or "/megatron/" in frame.filename
                or "/tests/" in frame.filename
            ):
                line = f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
                (self.ours if frame.filename.startswith(OURS) else self.megatrons).append(
                    (name, line)
                )
                return


class _Spread(TorchDispatchMode):
    """Marks the results of operations on the device's tensors as the device's."""

    def __init__(self, waits: HostWaits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(
            self.waits.marked(leaf)
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        ):
            self.waits.mark(
                *(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            )
        return result


class _Calls(TorchFunctionMode):
    """Looks at every call of torch from Python."""

    def __init__(self, waits: HostWaits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        on_device = any(
            self.waits.marked(leaf)
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        )
        by_mask = name in ("__getitem__", "__setitem__") and any(
            leaf.dtype == torch.bool
            for leaf in tree_leaves(args[1])
            if isinstance(leaf, torch.Tensor)
        )
        indices = (
            (args[1] if isinstance(args[1], tuple) else (args[1],))
            if name in ("__getitem__", "__setitem__")
            else ()
        )
        by_list = any(isinstance(index, list) for index in indices)
        number = (
            name == "__setitem__"
            and not isinstance(args[2], torch.Tensor)
            and any(isinstance(index, torch.Tensor) for index in indices)
        )
        where = name == "where" and len(args) + len(kwargs) == 1
        from_host = name in FROM_HOST and kwargs.get("device") is not None
        to_host = name in TO_HOST and not (
            name == "to"
            and all(isinstance(a, torch.dtype) for a in args[1:])
            and "device" not in kwargs
        )
        if from_host or (
            on_device
            and (to_host or name in SHAPE_BY_VALUE or by_mask or by_list or number or where)
        ):
            self.waits.note(name)
        if (
            name == "type"
        ):  # replaced on the CPU, where torch would call the replacement a second time
            function = torch._C.TensorBase.type
        result = function(*args, **kwargs)
        if kwargs.get("device") is not None:  # nothing of the host asks for a device
            self.waits.mark(
                *(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            )
        return result
