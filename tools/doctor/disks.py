"""The folder a run writes to: space, speed, locks, and whether other nodes see it."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doctor.finding import Finding, broken, doubtful, fine, gibibytes

TRIAL = Path(__file__).parent / "disk_trial.py"
TRIAL_MEBIBYTES = 64
FEWEST_FILES = 1000
SLOW_BYTES_PER_SECOND = 50 * 2**20
SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "fuse.juicefs", "fuse.glusterfs", "glusterfs", "cifs", "smb3",
          "9p", "afs", "orangefs", "wekafs", "fuse.sshfs", "virtiofs", "dpc", "fuse.alluxio-fuse", "fuse.s3fs")
VANISHING = ("tmpfs", "ramfs", "overlay")


def existing_folder(folder: Path) -> Path:
    """Returns ``folder``, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def file_system_of(folder: Path, mounts: str) -> str:
    """Returns the type of the file system a folder is on, from the text of /proc/self/mountinfo; "unknown" if it does not say."""
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


def try_disk(folder: Path, limit_seconds: float, mebibytes: int = TRIAL_MEBIBYTES) -> dict[str, Any]:
    """Returns what `disk_trial.py` says of a folder, or {"error": why it said nothing}."""
    command = [sys.executable, str(TRIAL), str(folder), str(mebibytes)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds, check=False)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"error": f"writing {mebibytes} MiB did not end within {limit_seconds:.0f} s"}
    except ValueError:
        said = done.stderr.strip().splitlines()
        return {"error": said[-1] if said else f"ended with status {done.returncode}"}


def check_disk(folder: Path, kind: str, facts: Mapping[str, Any], num_nodes: int, mebibytes: int = TRIAL_MEBIBYTES) -> list[Finding]:
    """Returns whether checkpoints can be written to a folder, and how fast.

    Args:
        folder: Which was tried.
        kind: Its file system's type.
        facts: Of the trial.
        num_nodes: Of the job.
        mebibytes: Written in the trial.
    """
    name = "run folder"
    shown = f"{folder} ({kind})"
    if "error" in facts:
        return [broken(name, f"{shown}: {facts['error']}", "Give a folder that can be written: --folder here, --save in the run.")]
    if not facts["same"]:
        return [broken(name, f"{shown}: read something else than was written", "Do not keep checkpoints there.")]
    speed = mebibytes * 2**20 / max(facts["seconds"], 1e-9)
    shown += f": {gibibytes(facts['free'])} free, {speed / 2**20:.0f} MiB/s written and flushed"
    found = []
    if facts["files"] is not None and facts["files"] < FEWEST_FILES:
        found.append(broken(name, f"{shown}, {facts['files']} files left to make", "Remove small files, or give another folder."))
    elif facts["free"] < 2**30:
        found.append(broken(name, shown, "Make room, or give another folder."))
    elif speed < SLOW_BYTES_PER_SECOND:
        found.append(doubtful(name, shown, "Checkpoints take long: a faster folder, or a --save-interval that --async-save keeps up with."))
    elif kind in VANISHING:
        found.append(doubtful(name, shown, "It is gone with the machine or container: mount a disk for what must stay."))
    else:
        found.append(fine(name, shown))
    if num_nodes > 1 and kind not in SHARED:
        found.append(doubtful("shared folder", f"{kind} is usually not shared between nodes",
                              "--save needs a folder that all nodes see; the network test finds out."))
    if not facts["locks"]:
        found.append(doubtful("file locks", f"{folder}: {facts['lock_error']}",
                              "Two runs may save into one folder unnoticed: mount with locks (NFS: lockd; Lustre: -o flock)."))
    return found


def check_space(folder: Path, free: int, checkpoint_bytes: int, kept: int | None) -> list[Finding]:
    """Returns whether there is room for a run's checkpoints.

    Args:
        folder: Of --save.
        free: Bytes.
        checkpoint_bytes: Size of one.
        kept: How many are kept (--save-retain); None: all.
    """
    shown = f"{gibibytes(free)} free in {folder}; a checkpoint takes about {gibibytes(checkpoint_bytes)}"
    needed = (kept or 1) + 1  # the new one is complete before an old one goes
    if free < checkpoint_bytes:
        return [broken("room for checkpoints", shown, "Make room, or give another --save.")]
    if free < needed * checkpoint_bytes:
        return [doubtful("room for checkpoints", shown, f"Make room for {needed}: a new one is written before an old one is removed.")]
    if kept is None and free < 10 * checkpoint_bytes:
        return [doubtful("room for checkpoints", f"{shown}, and all are kept", "Give --save-retain, or make room.")]
    return [fine("room for checkpoints", shown)]
