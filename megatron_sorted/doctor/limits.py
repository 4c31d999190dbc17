"""Limits of the system that break or slow down training: /dev/shm and CPU binding."""

import os

from megatron_sorted.doctor.finding import Finding, fail, format_bytes, ok, warn

GIBIBYTE = 2**30
DOCKER_DEFAULT_BYTES = 64 * 2**20
"""Size of /dev/shm in a container that was started without ``--shm-size``."""


def read_shared_memory() -> tuple[int | None, int]:
    """Return the size of /dev/shm (None if it cannot be written) and its free space, in bytes."""
    if not os.access("/dev/shm", os.W_OK):
        return None, 0
    state = os.statvfs("/dev/shm")
    return state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize


def check_shared_memory(total: int | None, free: int, has_device: bool) -> list[Finding]:
    """Check that processes of a node can communicate through /dev/shm; ``total`` None: missing."""
    remedy = (
        "docker run --shm-size=16g (or --ipc=host); in a pod an emptyDir of medium Memory at "
        "/dev/shm; else mount -o remount,size=16g /dev/shm"
    )
    if total is None:
        return [fail("/dev/shm", "missing or not writable", remedy)]
    shown = f"{format_bytes(free)} free of {format_bytes(total)}"
    if total <= DOCKER_DEFAULT_BYTES and has_device:
        return [fail("/dev/shm", shown, remedy)]
    if free < GIBIBYTE:
        left_behind = "Remove files that ended processes left there (ls -l /dev/shm)."
        return [warn("/dev/shm", shown, remedy if total < 2 * GIBIBYTE else left_behind)]
    return [ok("/dev/shm", shown)]


def check_cores(usable: int, cores: int, local_processes: int) -> list[Finding]:
    """Check that the processes of a node are not all bound to one CPU core.

    Args:
        usable: Number of cores that this process is bound to.
        cores: Number of cores of the host.
        local_processes: Number of the job's processes on this host.
    """
    shown = f"{usable} of {cores} usable"
    if local_processes > 1 and usable == 1 and cores > 1:
        remedy = (
            "srun --cpus-per-task=ALL (since SLURM 22.05 srun does not inherit it), "
            "or --cpu-bind=none."
        )
        return [warn("CPU cores", f"{shown}: every process on one core", remedy)]
    return [ok("CPU cores", shown)]
