"""Kernels in place of torch_npu's: each runs on CPU tensors that share the memory of NPU tensors.

A simulated NPU's memory is the host's (runtime.c), so only new results are copied. Allocation,
views and copies between devices stay torch_npu's own.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from tests.support.npu_simulation.references import REFERENCES

CPU = torch.device("cpu")
EMPTY_STRIDED, FROM_BUFFER = torch.empty_strided, torch.frombuffer  # before torch_npu wraps them
KEY = "PrivateUse1"  # under which torch_npu registers its kernels
NAMESPACES = ("aten", "npu", "c10d")
OWN = re.compile(
    r"aten::(empty|empty_strided|_pin_memory|is_pinned|record_stream|set_|resize_|view|_unsafe_view|"
    r"as_strided|_reshape_alias|alias|detach|_has_compatible|unfold$|_record|npu_)"
)
REDUCING = (
    "c10d::allreduce_",
    "c10d::reduce_",
    "c10d::reduce_scatter_",
    "c10d::_reduce_scatter_base_",
)
MIXING = 0x9E3779B97F4A7C15  # spreads neighbouring seeds
_libraries: list[torch.library.Library] = []  # a registration ends with its library


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor on the memory of an NPU tensor, which it keeps alive."""
    storage = tensor.untyped_storage()
    if not storage.nbytes() or not storage.data_ptr():
        return EMPTY_STRIDED(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = FROM_BUFFER(
        (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()), dtype=torch.uint8
    )
    whole = memory[: storage.nbytes() // tensor.element_size() * tensor.element_size()].view(
        tensor.dtype
    )
    alias = whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    alias.memory_of = storage
    return alias


def on_npu(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """Return a new NPU tensor with the values and strides of a CPU tensor."""
    made = EMPTY_STRIDED(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=torch.device("npu", index)
    )
    if tensor.numel():
        extent = 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True)
        )
        ctypes.memmove(made.data_ptr(), tensor.data_ptr(), extent * tensor.element_size())
    return made


@contextmanager
def _random_numbers_of(generators: list[torch.Generator], index: int) -> Iterator[None]:
    """Draw random numbers of CPU operations from the state of an NPU's generator.

    That state advances; the CPU's own state is unchanged.
    """
    generator = generators[0] if generators else torch.npu.default_generators[index]
    seed, offset = generator.get_state().view(torch.int64).tolist()
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed((seed * MIXING + offset) % 2**63)
        yield
    finally:
        torch.set_rng_state(before)
        generator.set_offset(offset + 4)


def _by_name(reference: Callable, arguments: list[str]) -> Callable:
    """Return a reference that takes its arguments as the operation's schema names them."""
    return lambda *args, **options: reference(**dict(zip(arguments, args, strict=False)), **options)


def kernel_of(op: torch._ops.OpOverload) -> Callable:
    """Return a kernel for NPU tensors that runs ``op``, or its reference, on their memory."""
    name, arguments = op._schema.name, [argument.name for argument in op._schema.arguments]
    device_place = arguments.index("device") if "device" in arguments else None
    run = _by_name(REFERENCES[name], arguments) if name in REFERENCES else op
    draws = torch.Tag.nondeterministic_seeded in op.tags

    def kernel(*args, **options):
        device = options.get("device")
        if device is None and device_place is not None and device_place < len(args):
            device = args[device_place]
        if device is not None:
            device = torch.device(device)
        # the id of each alias -> the alias and its NPU tensor
        origin: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        generators: list[torch.Generator] = []

        def to_cpu(value):
            if isinstance(value, torch.Tensor):
                if value.device.type != "npu":
                    return value
                alias = on_cpu(value)
                origin[id(alias)] = (alias, value)
                return alias
            if isinstance(value, list | tuple):
                return type(value)(map(to_cpu, value))
            if isinstance(value, torch.Generator):
                generators.append(value)
                return None  # the CPU's own draws in its place
            return CPU if isinstance(value, torch.device) else value

        def from_cpu(value):
            if isinstance(value, list | tuple):
                return type(value)(map(from_cpu, value))
            if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
                return value
            if id(value) in origin:
                return origin[id(value)][1]
            return value if device is not None and device.type == "cpu" else on_npu(value, index)

        args = [to_cpu(value) for value in args]
        options = {option: to_cpu(value) for option, value in options.items()}
        if name in REDUCING and any(alias.dtype == torch.float64 for alias, _ in origin.values()):
            raise RuntimeError(f"simulated HCCL: {name} does not take float64")
        if device is not None and device.type == "npu" and device.index is not None:
            index = device.index
        else:
            index = (
                next(iter(origin.values()))[1].device.index
                if origin
                else torch.npu.current_device()
            )
        if options.get("pin_memory"):
            options["pin_memory"] = False
        with _random_numbers_of(generators, index) if draws else nullcontext():
            return from_cpu(run(*args, **options))

    return kernel


def replace_kernels() -> int:
    """Replace all kernels of NPUs that compute something; return their number."""
    for name in sorted(torch._C._dispatch_get_registrations_for_dispatch_key(KEY)):
        namespace, rest = name.split("::")
        base, _, overload = rest.partition(".")
        full = f"{namespace}::{base}"
        if (
            namespace not in NAMESPACES
            or OWN.match(full)
            or (namespace == "npu" and full not in REFERENCES)
        ):
            continue
        op = getattr(
            getattr(getattr(torch.ops, namespace), base, None), overload or "default", None
        )
        if op is None:
            continue
        if namespace == "aten" and any(
            r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns
        ):
            continue  # a view
        library = torch.library.Library(namespace, "IMPL")
        library.impl(rest, kernel_of(op), KEY, allow_override=True)
        _libraries.append(library)
    return len(_libraries)
