"""The folder a run writes to: free space, speed and locks.

``python -m megatron_sorted.doctor.disks FOLDER MEBIBYTES`` measures a folder, in a process of its
own, since a file system may hang.
"""

import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.doctor.finding import Finding, fail, format_bytes, ok, warn
from megatron_sorted.doctor.probes import run_module

MEBIBYTES_TO_WRITE = 64
SLOW_BYTES_PER_SECOND = 50 * 2**20
TEMPORARY = ("tmpfs", "ramfs", "overlay")
"""File systems whose content is lost with the machine or container."""


def existing_folder(folder: Path) -> Path:
    """Return ``folder``, or its nearest parent that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def file_system_of(folder: Path, mounts: str) -> str:
    """Return the type of a folder's file system, from the text of /proc/self/mountinfo."""
    longest, file_system = "", "unknown"
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        mount_point = fields[4].replace("\\040", " ")
        inside = f"{folder}/".startswith(mount_point.rstrip("/") + "/")
        if inside and len(mount_point) >= len(longest):
            longest, file_system = mount_point, after.split()[0]
    return file_system


def write_and_lock(folder: str, mebibytes: int) -> dict[str, Any]:
    """Write, flush and lock an unnamed file.

    Returns:
        seconds: Time to write and flush. free: Free bytes. lock_error: Why it cannot be locked.
    """
    block = os.urandom(2**20)
    lock_error = None
    with tempfile.TemporaryFile(dir=folder, prefix=".doctor_") as file:
        began = time.monotonic()
        for _ in range(mebibytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.monotonic() - began
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock_error = error.strerror
    state = os.statvfs(folder)
    return {"seconds": seconds, "free": state.f_bavail * state.f_frsize, "lock_error": lock_error}


def measure_disk(
    folder: Path, limit_seconds: float, mebibytes: int = MEBIBYTES_TO_WRITE
) -> dict[str, Any]:
    """Return what ``write_and_lock`` measures in a folder, or {"error": the reason it failed}."""
    printed, end = run_module(
        "megatron_sorted.doctor.disks", (folder, mebibytes), os.environ, limit_seconds
    )
    try:
        return json.loads(printed)
    except ValueError:
        return {"error": f"writing {mebibytes} MiB: {end}"}


def check_disk(
    folder: Path, file_system: str, facts: Mapping[str, Any], mebibytes: int = MEBIBYTES_TO_WRITE
) -> list[Finding]:
    """Check that checkpoints can be written to a folder, and how fast.

    Args:
        folder: The measured folder.
        file_system: The type of its file system.
        facts: The result of ``measure_disk``.
        mebibytes: MiB written in the measurement.
    """
    name, shown = "run folder", f"{folder} ({file_system})"
    if "error" in facts:
        remedy = "Give a folder that can be written: --folder here, --save in the run."
        return [fail(name, f"{shown}: {facts['error']}", remedy)]
    speed = mebibytes * 2**20 / max(facts["seconds"], 1e-9)
    shown += f": {format_bytes(facts['free'])} free, {speed / 2**20:.0f} MiB/s written and flushed"
    if facts["free"] < 2**30:
        findings = [fail(name, shown, "Free space, or give another folder.")]
    elif speed < SLOW_BYTES_PER_SECOND:
        remedy = "Saving takes long: use a faster folder, or --async-save with rarer checkpoints."
        findings = [warn(name, shown, remedy)]
    elif file_system in TEMPORARY:
        remedy = "Its content is lost with the machine or container: mount a disk for checkpoints."
        findings = [warn(name, shown, remedy)]
    else:
        findings = [ok(name, shown)]
    if facts["lock_error"]:
        remedy = (
            "Two runs may save into one folder unnoticed: mount with locks "
            "(NFS: lockd; Lustre: -o flock)."
        )
        findings.append(warn("file locks", f"{folder}: {facts['lock_error']}", remedy))
    return findings


def check_space(folder: Path, free: int, checkpoint_bytes: int, kept: int | None) -> list[Finding]:
    """Check that a folder has space for a run's checkpoints.

    Args:
        folder: The folder of --save.
        free: Free bytes.
        checkpoint_bytes: Size of one checkpoint.
        kept: Number of checkpoints to keep (--save-retain); None: all.
    """
    name = "room for checkpoints"
    shown = (
        f"{format_bytes(free)} free in {folder}; "
        f"a checkpoint takes about {format_bytes(checkpoint_bytes)}"
    )
    needed = (kept or 1) + 1  # a new checkpoint is complete before an old one is removed
    if free < checkpoint_bytes:
        return [fail(name, shown, "Free space, or give another --save.")]
    if free < needed * checkpoint_bytes:
        remedy = f"Free space for {needed}: a new one is written before an old one is removed."
        return [warn(name, shown, remedy)]
    return [ok(name, shown if kept else f"{shown}; all are kept (--save-retain)")]


if __name__ == "__main__":
    try:
        answer = write_and_lock(sys.argv[1], int(sys.argv[2]))
    except OSError as error:
        answer = {"error": error.strerror or str(error)}
    print(json.dumps(answer))
