"""CPUs with gloo: the same Megatron code, with its calls of CUDA redirected to the CPU.

Megatron-core writes ``device="cuda"`` and calls ``torch.cuda`` in its schedules, buffers and
optimizers. Here those names are redirected, in this process only, before Megatron runs. No file or
function of Megatron is changed except the two that read and write the state of a CUDA generator,
which are replaced by those of the CPU generator.
"""

import contextlib
import functools
import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_sorted.platform.contract import Platform

CPU = torch.device("cpu")
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "full",
    "ones", "rand", "randint", "randn", "tensor", "zeros",
)  # fmt: skip
"""The tensor factories that Megatron calls with device="cuda" or a device index."""


def _names_cuda(device: object) -> bool:
    """Return whether ``device`` means a GPU (a name, a device, or Megatron's plain index)."""
    if isinstance(device, int):
        return True
    return device is not None and str(device).startswith("cuda")


def _redirected(factory, device: torch.device):
    @functools.wraps(factory)
    def create(*args, **kwargs):
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = device
        return factory(*args, **kwargs)

    return create


def _identity(thing, *_args, **_kwargs):
    return thing


def _nothing(*_args, **_kwargs) -> None:
    return None


def _set_rng_state(state: torch.Tensor, *_args, **_kwargs) -> None:
    torch.set_rng_state(state)


def _get_rng_state(*_args, **_kwargs) -> torch.Tensor:
    return torch.get_rng_state()


def _type_as_cuda(method):
    """Make ``Tensor.type`` return the CUDA names by which Megatron's optimizers recognise dtypes.

    An example is "torch.cuda.FloatTensor".
    """

    @functools.wraps(method)
    def type_name(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return method(self, dtype, *args, **kwargs)
        return method(self).replace("torch.", "torch.cuda.", 1)

    return type_name


def _with_plain_sizes(all_to_all: Callable) -> Callable:
    """Return ``all_to_all_single`` that takes its split sizes as tensors too.

    Megatron makes numbers of those that it copies from a GPU, and leaves tensors of the host alone.
    """

    @functools.wraps(all_to_all)
    def exchange(output, input, output_split_sizes=None, input_split_sizes=None, *args, **kwargs):
        sizes = (
            given.tolist() if isinstance(given, torch.Tensor) else given
            for given in (output_split_sizes, input_split_sizes)
        )
        return all_to_all(output, input, *sizes, *args, **kwargs)

    return exchange


class _NoStream:
    """A stream of a device that works in order, or an event in it: there is nothing to wait for."""

    def __init__(self, *_arguments, **_options):
        pass

    wait_event = wait_stream = synchronize = staticmethod(_nothing)

    def record_event(self, *_arguments) -> "_NoStream":
        """Return the event up to which the stream has worked."""
        return self


def redirect_cuda(device: torch.device = CPU) -> None:
    """Redirect Megatron-core's CUDA calls to another device for the life of the process.

    Calling it again does nothing.
    """
    if getattr(torch.cuda, "redirected_to", None) is not None:
        assert torch.cuda.redirected_to == device, "one process, one device"
        return
    torch.cuda.redirected_to = device
    for name in FACTORIES:
        setattr(torch, name, _redirected(getattr(torch, name), device))
    torch.Tensor.cuda = _identity
    torch.nn.Module.cuda = _identity
    torch.Tensor.type = _type_as_cuda(torch.Tensor.type)
    torch.cuda.current_device = lambda: device
    torch.cuda.synchronize = _nothing
    torch.cuda.empty_cache = _nothing
    torch.cuda.current_stream = lambda *_arguments: _NoStream()
    # experts whose tokens are sent by all-to-all copy their numbers to the host in another stream
    torch.cuda.Stream = _NoStream
    torch.cuda.stream = contextlib.nullcontext
    torch.distributed.all_to_all_single = _with_plain_sizes(torch.distributed.all_to_all_single)
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = _get_rng_state
    torch.cuda.random.get_rng_state = _get_rng_state
    torch.cuda.set_rng_state = _set_rng_state
    from megatron.core.tensor_parallel import random as megatron_random

    # the tracker warns when the CPU generator advances inside its context, as it is meant to here
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state


def _no_compile(function: Callable | None = None, **_options) -> Callable:
    """Replace torch.compile, as a function or as a decorator, without compiling."""
    return _identity if function is None else function


def keep_unused_out() -> None:
    """Keep Megatron's import from loading packages that a run on a CPU never calls.

    That halves the start-up time. Megatron decorates fused operations with torch.compile, which
    loads inductor; they are off (``model/config.py``). And it imports wandb where that is
    installed; a separate process sends reports to wandb.
    """
    if "megatron.core" not in sys.modules:
        torch.compile = _no_compile
        sys.modules.setdefault("wandb", None)


class CpuPlatform(Platform):
    """Any number of processes on the cores of one or more hosts."""

    name = "cpu"
    backend = "gloo"
    is_processor = True

    def prepare(self) -> None:
        """Redirect Megatron's CUDA calls, see the module's docstring."""
        redirect_cuda()

    def device(self) -> torch.device:
        """Return the CPU."""
        return CPU

    def reset_peak_memory(self) -> None:
        """Reset the kernel's record of peak resident memory.

        On systems other than Linux the peak is always that of the whole life of the process.
        """
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def peak_memory_bytes(self) -> int:
        """Return the peak of resident memory, in bytes."""
        if sys.platform == "linux":
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
