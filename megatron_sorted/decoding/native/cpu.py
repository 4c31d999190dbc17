"""This machine's CPU: its name for the cache, and how many cores this process may use."""

import ctypes
import math
import os
import platform
import sys
from functools import cache
from pathlib import Path

from megatron_sorted.decoding.native.compiler import NativeError

WANTED = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags",
          "CPU implementer", "CPU part", "CPU variant", "Features", "isa", "cpu")  # fmt: skip
"""Lines of /proc/cpuinfo that differ between CPUs with other instructions."""


def check_architecture() -> None:
    """Check that this is an architecture that the source is written for.

    Raises:
        NativeError: Its pointers have 32 bits, or it stores the highest byte first.
    """
    if sys.maxsize < 2**32:
        raise NativeError(f"this is a Python of 32 bits ({platform.machine()})")
    if sys.byteorder != "little":
        raise NativeError(f"the CPU ({platform.machine()}) stores the highest byte first")


def cpu_name(root: Path = Path("/")) -> str:
    """Return a text that differs between CPUs with other instructions.

    Args:
        root: Root of the file system; another one for tests.
    """
    lines = [sys.platform, platform.machine()]
    try:
        with (root / "proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    break  # the first core is enough: with many the file is long
                if line.partition(":")[0].strip() in WANTED:
                    lines.append(line.strip())
    except OSError:
        names = ("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features")
        lines += [_system_value(name) for name in names]
    return "\n".join(lines)


def _system_value(name: str) -> str:
    """Return a text that macOS knows by name; empty where it does not."""
    try:
        ask, value = ctypes.CDLL(None).sysctlbyname, ctypes.create_string_buffer(4096)
    except (OSError, AttributeError):
        return ""
    size = ctypes.c_size_t(len(value))
    if ask(name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return ""
    return value.value.decode(errors="replace")


@cache
def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: those it is bound to, and its group's limit.

    Args:
        root: Root of the file system; another one for tests.
    """
    if hasattr(os, "sched_getaffinity"):
        bound = len(os.sched_getaffinity(0))
    else:  # macOS
        bound = os.cpu_count() or 1
    quota = min(_quotas(root), default=None)
    return bound if quota is None else max(1, min(bound, math.ceil(quota)))


def _quotas(root: Path) -> list[float]:
    """Return the limits of this process's control groups, in cores, from the inner to the outer."""
    quotas = []
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in groups:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            top, read = root / "sys/fs/cgroup", _quota_of
        elif "cpu" in controllers.split(","):
            top, read = root / "sys/fs/cgroup/cpu", _old_quota_of
        else:
            continue
        inner = Path(name.lstrip("/"))
        # a container sees its own group as the top, whatever its name outside
        for part in dict.fromkeys([inner, *inner.parents, Path()]):
            quotas += read(top / part)
    return quotas


def _quota_of(folder: Path) -> list[float]:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return [] if quota == "max" else [int(quota) / int(period)]
    except (OSError, ValueError, ZeroDivisionError):
        return []


def _old_quota_of(folder: Path) -> list[float]:
    try:
        quota, period = (
            int((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii"))
            for name in ("quota", "period")
        )
        return [quota / period] if quota > 0 else []
    except (OSError, ValueError, ZeroDivisionError):
        return []
