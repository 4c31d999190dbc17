"""The folder a run writes to: space, speed, locks, and whether other nodes see it.

python -m megatron_sorted.doctor.disks FOLDER MEBIBYTES     try a folder: a process of its own, since a file system may hang
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

from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine, gibibytes
from megatron_sorted.doctor.probes import run_module

TRIAL_MEBIBYTES = 64
FEWEST_FILES = 1000
SLOW_BYTES_PER_SECOND = 50 * 2**20
SHARED = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.ceph",
    "fuse.juicefs",
    "fuse.glusterfs",
    "glusterfs",
    "cifs",
    "smb3",
    "9p",
    "afs",
    "orangefs",
    "wekafs",
    "fuse.sshfs",
    "virtiofs",
    "dpc",
    "fuse.alluxio-fuse",
    "fuse.s3fs",
)
VANISHING = ("tmpfs", "ramfs", "overlay")


def existing_folder(folder: Path) -> Path:
    """Return ``folder``, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def file_system_of(folder: Path, mounts: str) -> str:
    """Return the type of the file system a folder is on, from the text of /proc/self/mountinfo; "unknown" if it does not say."""
    best, kind = "", "unknown"
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        words = before.split()
        if len(words) < 5 or not after:
            continue
        point = words[4].replace("\\040", " ")
        inside = str(folder) == point or str(folder).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, after.split()[0]
    return kind


def trial(folder: str, mebibytes: int) -> dict[str, Any]:
    """Write, lock and read a file without a name; return seconds to write and flush, and what worked."""
    facts: dict[str, Any] = {}
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder, prefix=".doctor_") as file:
        began = time.monotonic()
        for _ in range(mebibytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        facts["seconds"] = time.monotonic() - began
        file.seek((mebibytes - 1) * len(block))
        facts["same"] = file.read() == block
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            facts["locks"] = True
        except OSError as error:
            facts |= {"locks": False, "lock_error": error.strerror}
    state = os.statvfs(folder)
    # some file systems have no count of files: 0 of 0
    return {
        **facts,
        "free": state.f_bavail * state.f_frsize,
        "files": state.f_favail if state.f_files else None,
    }


def try_disk(
    folder: Path, limit_seconds: float, mebibytes: int = TRIAL_MEBIBYTES
) -> dict[str, Any]:
    """Return what ``trial`` says of a folder, or {"error": why it said nothing}."""
    printed, end = run_module(
        "megatron_sorted.doctor.disks", (folder, mebibytes), os.environ, limit_seconds
    )
    try:
        return json.loads(printed)
    except ValueError:
        return {"error": f"writing {mebibytes} MiB: {end}"}


def check_disk(
    folder: Path,
    kind: str,
    facts: Mapping[str, Any],
    num_nodes: int,
    mebibytes: int = TRIAL_MEBIBYTES,
) -> list[Finding]:
    """Return whether checkpoints can be written to a folder, and how fast.

    Args:
        folder: Which was tried.
        kind: Its file system's type.
        facts: What the trial said.
        num_nodes: Number of nodes of the job.
        mebibytes: Written in the trial.
    """
    name = "run folder"
    shown = f"{folder} ({kind})"
    if "error" in facts:
        return [
            broken(
                name,
                f"{shown}: {facts['error']}",
                "Give a folder that can be written: --folder here, --save in the run.",
            )
        ]
    if not facts["same"]:
        return [
            broken(
                name,
                f"{shown}: read something else than was written",
                "Do not keep checkpoints there.",
            )
        ]
    speed = mebibytes * 2**20 / max(facts["seconds"], 1e-9)
    shown += f": {gibibytes(facts['free'])} free, {speed / 2**20:.0f} MiB/s written and flushed"
    found = []
    if facts["files"] is not None and facts["files"] < FEWEST_FILES:
        found.append(
            broken(
                name,
                f"{shown}, {facts['files']} files left to make",
                "Remove small files, or give another folder.",
            )
        )
    elif facts["free"] < 2**30:
        found.append(broken(name, shown, "Make room, or give another folder."))
    elif speed < SLOW_BYTES_PER_SECOND:
        found.append(
            doubtful(
                name,
                shown,
                "Checkpoints take long: a faster folder, or a --save-interval that --async-save keeps up with.",
            )
        )
    elif kind in VANISHING:
        found.append(
            doubtful(
                name,
                shown,
                "It is gone with the machine or container: mount a disk for what must stay.",
            )
        )
    else:
        found.append(fine(name, shown))
    if num_nodes > 1 and kind not in SHARED:
        found.append(
            doubtful(
                "shared folder",
                f"{kind} is usually not shared between nodes",
                "--save needs a folder that all nodes see; the network test finds out.",
            )
        )
    if not facts["locks"]:
        found.append(
            doubtful(
                "file locks",
                f"{folder}: {facts['lock_error']}",
                "Two runs may save into one folder unnoticed: mount with locks (NFS: lockd; Lustre: -o flock).",
            )
        )
    return found


def check_space(folder: Path, free: int, checkpoint_bytes: int, kept: int | None) -> list[Finding]:
    """Return whether there is room for a run's checkpoints.

    Args:
        folder: The folder of --save.
        free: Bytes.
        checkpoint_bytes: Size of one.
        kept: How many are kept (--save-retain); None: all.
    """
    shown = f"{gibibytes(free)} free in {folder}; a checkpoint takes about {gibibytes(checkpoint_bytes)}"
    needed = (kept or 1) + 1  # the new one is complete before an old one goes
    if free < checkpoint_bytes:
        return [broken("room for checkpoints", shown, "Make room, or give another --save.")]
    if free < needed * checkpoint_bytes:
        return [
            doubtful(
                "room for checkpoints",
                shown,
                f"Make room for {needed}: a new one is written before an old one is removed.",
            )
        ]
    if kept is None and free < 10 * checkpoint_bytes:
        return [
            doubtful(
                "room for checkpoints",
                f"{shown}, and all are kept",
                "Give --save-retain, or make room.",
            )
        ]
    return [fine("room for checkpoints", shown)]


if __name__ == "__main__":
    try:
        answer = trial(sys.argv[1], int(sys.argv[2]))
    except OSError as error:
        answer = {"error": error.strerror or str(error)}
    print(json.dumps(answer))
