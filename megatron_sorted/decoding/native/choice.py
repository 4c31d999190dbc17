"""Whether the compiled library runs a network, and the note where it does not."""

import sys
from functools import cache

import torch

from megatron_sorted.decoding.native import CHOICES
from megatron_sorted.decoding.native.compiler import NativeError
from megatron_sorted.decoding.native.cpu import usable_cores
from megatron_sorted.decoding.native.library import native_library
from megatron_sorted.errors import SettingsError

KIND_NAMES = {
    torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8",
}  # fmt: skip
"""Names of the kinds of weights that the library knows, by the data type that chooses them."""


def native_kind(native: str, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Return the kind of weights with which the library is to run a network; None: torch runs it.

    Where only the library will do, this asks for it, so that a refusal comes before a model is
    read.

    Args:
        native: "on", "off", or "auto": on a CPU, unless it cannot.
        dtype: Data type of the weights.
        device: Device of the weights.

    Raises:
        SettingsError: The three do not go together, or the library is needed and cannot be used.
    """
    name = str(dtype).removeprefix("torch.")
    if native not in CHOICES:
        raise SettingsError(
            f"--native: {native} is not one of {', '.join(CHOICES)}. Use one of them."
        )
    if not (dtype.is_floating_point or dtype == torch.int8):
        raise SettingsError(f"--dtype: {name} is no kind of weights. Use float32 or int8.")
    is_needed = native == "on" or dtype == torch.int8
    if native == "off":
        if dtype == torch.int8:
            raise SettingsError(
                "--dtype int8: only the compiled library decodes with it, and --native is off. "
                "Use --native auto, or --dtype float32 or bfloat16."
            )
        return None
    if torch.device(device).type != "cpu":
        if is_needed:
            option = "--native on" if native == "on" else "--dtype int8"
            raise SettingsError(
                f"{option}: the compiled library runs on CPUs alone, and the device is {device}. "
                "Use --device cpu, or --native auto with --dtype float32, bfloat16 or float16."
            )
        return None
    kind = KIND_NAMES.get(dtype)
    if kind is None and native == "on":
        raise SettingsError(
            f"--native on: the compiled library does not know {name}. "
            f"Use --dtype {', '.join(KIND_NAMES.values())}, or --native auto."
        )
    if kind is None:
        report_once(
            "fallback",
            f"torch decodes, more slowly than the compiled library (--native): it does not know "
            f"{name}, only {', '.join(KIND_NAMES.values())}",
        )
    if is_needed:
        try:
            native_library()
        except NativeError as error:
            refuse_or_report(error, native, kind)
    return kind


def refuse_or_report(error: NativeError, native: str, kind: str) -> None:
    """Report why torch runs a network instead of the library; once in a process.

    Raises:
        SettingsError: The library was asked for, or torch cannot run this kind of weights.
    """
    if native == "on":
        raise SettingsError(f"--native on: {error}. Correct that, or use --native auto.") from error
    if kind == "int8":
        raise SettingsError(
            f"--dtype int8: only the compiled library decodes with it, and {error}. Correct that, "
            "or use --dtype float32 or bfloat16."
        ) from error
    report_once(
        "fallback", f"torch decodes, more slowly than the compiled library (--native): {error}"
    )


_reported: set[str] = set()


def report_once(subject: str, line: str) -> None:
    """Print a note on standard error unless this process has printed one on the subject."""
    if subject not in _reported:
        _reported.add(subject)
        print(f"note: {line}", file=sys.stderr, flush=True)


def native_threads() -> int:
    """Return the number of threads of the library: torch's, but not more than usable cores."""
    return _clipped(torch.get_num_threads())


@cache
def _clipped(threads: int) -> int:
    cores = usable_cores()
    if threads > cores:
        report_once(
            "threads",
            f"{threads} threads are more than the {cores} CPU cores that are usable here: the "
            f"compiled library uses {cores}",
        )
    return min(threads, cores)
