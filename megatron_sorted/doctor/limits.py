"""What the system allows: open files, locked memory, /dev/shm, memory, CPU cores, a container's shares."""

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine, gibibytes

UNLIMITED = -1
MEBIBYTE, GIBIBYTE = 2**20, 2**30
DOCKER_SHARED_BYTES = 64 * MEBIBYTE


def read_limits() -> tuple[int, int]:
    """Return how many files this process may open and how many bytes it may lock; -1 for no limit."""
    soft = [
        resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)
    ]
    return tuple(UNLIMITED if value == resource.RLIM_INFINITY else value for value in soft)


def check_limits(nofile: int, memlock: int, has_device: bool) -> list[Finding]:
    """Check the shell's limits; -1 means unlimited.

    Args:
        nofile: Open files (ulimit -n).
        memlock: Bytes of locked memory (ulimit -l).
        has_device: Whether the host has accelerators, or adapters that read its memory.
    """
    files = "unlimited" if nofile == UNLIMITED else str(nofile)
    locked = "unlimited" if memlock == UNLIMITED else f"{memlock // 1024} KiB"
    where = "in /etc/security/limits.conf, the service of the scheduler (LimitNOFILE= and the like), or docker run --ulimit"
    found = []
    if nofile != UNLIMITED and nofile < 8192:
        verdict = broken if nofile < 256 else doubtful
        found.append(
            verdict(
                "ulimit -n (files)",
                files,
                f"ulimit -n 65536; {where}. Connections and data files take one each.",
            )
        )
    if memlock != UNLIMITED and memlock < GIBIBYTE and has_device:
        found.append(
            doubtful(
                "ulimit -l (locked)", locked, f"ulimit -l unlimited; {where}. RDMA pins memory."
            )
        )
    return found or [fine("limits", f"files {files}, locked {locked}")]


def read_shared_memory() -> tuple[int | None, int]:
    """Return the size of /dev/shm and what is free of it, in bytes; a size of None where it cannot be written."""
    if not os.access("/dev/shm", os.W_OK):
        return None, 0
    state = os.statvfs("/dev/shm")
    return state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize


def check_shared_memory(total: int | None, free: int, has_device: bool) -> list[Finding]:
    """Check that processes of a node can talk through /dev/shm; ``total`` is None where it is missing."""
    remedy = (
        "docker run --shm-size=16g (or --ipc=host); in a pod an emptyDir of medium Memory at /dev/shm; "
        "else mount -o remount,size=16g /dev/shm"
    )
    if total is None:
        return [broken("/dev/shm", "missing or not writable", remedy)]
    shown = f"{gibibytes(free)} free of {gibibytes(total)}"
    if total <= DOCKER_SHARED_BYTES and has_device:
        return [broken("/dev/shm", shown, remedy)]
    if free < GIBIBYTE:
        left_behind = "Remove what dead processes left there (ls -l /dev/shm)."
        return [doubtful("/dev/shm", shown, remedy if total < 2 * GIBIBYTE else left_behind)]
    return [fine("/dev/shm", shown)]


@dataclass(frozen=True)
class Container:
    """Limits of the control group this process is in; None: not limited.

    Attributes:
        memory_bytes: Most memory.
        memory_used_bytes: Memory in use.
        cpus: Share of processors.
        processes: Most processes and threads.
    """

    memory_bytes: int | None = None
    memory_used_bytes: int = 0
    cpus: float | None = None
    processes: int | None = None


def read_container(root: Path) -> Container:
    """Return the limits in control group files of version 2 or 1 below ``root`` (the system's: /sys/fs/cgroup)."""

    def number(name: str) -> int | None:
        try:
            word = (root / name).read_text().split()[0]
        except (OSError, IndexError):
            return None
        # version 1 writes a number near 2^63 for "no limit"
        return int(word) if word.isdigit() and int(word) < 2**60 else None

    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = (
            str(number("cpu/cpu.cfs_quota_us") or "max"),
            str(number("cpu/cpu.cfs_period_us") or 1),
        )
    cpus = int(quota) / int(period) if quota.isdigit() else None
    memory = number("memory.max") or number("memory/memory.limit_in_bytes")
    used = number("memory.current") or number("memory/memory.usage_in_bytes") or 0
    return Container(memory, used, cpus, number("pids.max") or number("pids/pids.max"))


def read_memory() -> tuple[int, int]:
    """Return this host's memory and what is available of it, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))


def check_memory(total: int, available: int, container: Container) -> list[Finding]:
    """Check that there is memory to work with, in a container too."""
    shown = f"{gibibytes(available)} free of {gibibytes(total)}"
    if container.memory_bytes is not None and container.memory_bytes < total:
        left = max(0, container.memory_bytes - container.memory_used_bytes)
        shown += f"; the container may use {gibibytes(container.memory_bytes)}"
        available = min(available, left) if left > 0 else available
    if available < GIBIBYTE:
        return [
            doubtful(
                "memory",
                shown,
                "End other programs, or raise the job's or container's memory (srun --mem=0, docker run --memory).",
            )
        ]
    return [fine("memory", shown)]


def check_processors(
    container: Container,
    environment: Mapping[str, str],
    local_processes: int,
    cores: int = os.cpu_count() or 1,
    usable: int | None = None,
) -> list[Finding]:
    """Check that processes and threads fit the processors they may use.

    Args:
        container: The container's limits.
        environment: The process's environment.
        local_processes: Processes of the job on this host.
        cores: Cores of the host.
        usable: Cores this process is bound to, by default what the system says.
    """
    usable = len(os.sched_getaffinity(0)) if usable is None else usable
    found = []
    share = min(usable, container.cpus or usable)
    shown = f"{usable} of {cores} usable" + (
        f", a share of {container.cpus:g}" if container.cpus else ""
    )
    threads = environment.get("OMP_NUM_THREADS")
    if threads is not None and not all(
        part.isdigit() and int(part) > 0 for part in threads.split(",")
    ):
        return [broken("OMP_NUM_THREADS", threads, "Give a number of 1 or more.")]
    if local_processes > 1 and usable == 1 and cores > 1:
        found.append(
            doubtful(
                "CPU cores",
                f"{shown}: every process on one core",
                "srun --cpus-per-task=ALL (since SLURM 22.05 srun does not inherit it), or --cpu-bind=none.",
            )
        )
    else:
        found.append(fine("CPU cores", shown))
    remedy = f"export OMP_NUM_THREADS={max(1, int(share) // local_processes)}"
    if threads is None and local_processes > 1:
        found.append(
            doubtful(
                "OMP_NUM_THREADS",
                f"unset, with {local_processes} processes on the host",
                f"{remedy}: each process would start {usable} threads.",
            )
        )
    elif threads is not None and int(threads.split(",")[0]) * local_processes > max(
        share, local_processes
    ):
        found.append(
            doubtful(
                "OMP_NUM_THREADS",
                f"{threads} x {local_processes} processes on {share:g} cores",
                remedy,
            )
        )
    else:
        found.append(fine("OMP_NUM_THREADS", threads or "unset"))
    if container.processes is not None and container.processes < 1024:
        found.append(
            doubtful(
                "processes",
                f"the container allows {container.processes}",
                "Raise it: docker run --pids-limit=-1.",
            )
        )
    return found
