"""Numbers that Linux tells in its files and calls."""

import os
import resource
from pathlib import Path

from doctor.limits import UNLIMITED


def kernel_number(name: str) -> int | None:
    """Returns a number below /proc/sys; None where the kernel has none of this name."""
    file = Path("/proc/sys") / name
    return int(file.read_text()) if file.is_file() else None


def ports() -> tuple[tuple[int, int], str]:
    """Returns the first and last port given to outgoing connections, and those left out of them, as the kernel writes them."""
    folder = Path("/proc/sys/net/ipv4")
    first, last = map(int, (folder / "ip_local_port_range").read_text().split())
    reserved = folder / "ip_local_reserved_ports"
    return (first, last), reserved.read_text() if reserved.is_file() else ""


def limits() -> tuple[int, int, int, int]:
    """Returns this process's limits: open files, bytes of locked memory, bytes of stack, processes; -1 for none."""
    kinds = (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_STACK, resource.RLIMIT_NPROC)
    soft = [resource.getrlimit(kind)[0] for kind in kinds]
    return tuple(UNLIMITED if value == resource.RLIM_INFINITY else value for value in soft)


def shared_memory() -> tuple[int | None, int]:
    """Returns the size of /dev/shm and what is free of it, in bytes; a size of None where it cannot be written."""
    if not os.access("/dev/shm", os.W_OK):
        return None, 0
    state = os.statvfs("/dev/shm")
    return state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize


def memory() -> tuple[int, int]:
    """Returns this host's memory and what is available of it, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
