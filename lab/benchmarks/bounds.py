"""Bounds on the times of a checkpoint: what the machine alone needs for the same bytes."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

PIECE_BYTES = 16 << 20
SAMPLE_BYTES = 256 << 20
"""Bytes on which copying and hashing are measured and scaled; disks are measured on all."""


def seconds_of(work: Callable[[], object]) -> float:
    """Return the wall time of ``work()``."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forget_cached(paths: list[Path]) -> None:
    """Make the next read of these files, which must be on disk already, come from the disk."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write(path: Path, num_bytes: int, piece: memoryview) -> None:
    with open(path, "wb", buffering=0) as file:
        for start in range(0, num_bytes, PIECE_BYTES):
            file.write(piece[: min(PIECE_BYTES, num_bytes - start)])
        os.fsync(file.fileno())


def _read(path: Path, into: bytearray) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(into):
            pass


def measure_bounds(folder: Path, num_bytes: int) -> dict[str, float]:
    """Return the seconds in which ``num_bytes`` are written, read, copied and hashed.

    They are written to a file in ``folder`` and flushed, and read back from disk.
    """
    path = folder / f"bound.{os.getpid()}"
    piece = os.urandom(PIECE_BYTES)
    try:
        write = seconds_of(lambda: _write(path, num_bytes, memoryview(piece)))
        forget_cached([path])
        into = bytearray(PIECE_BYTES)
        read = seconds_of(lambda: _read(path, into))
    finally:
        path.unlink(missing_ok=True)
    sample = min(num_bytes, SAMPLE_BYTES)
    scale = num_bytes / sample
    source = torch.ones(sample, dtype=torch.uint8, device="cpu")
    target = source.clone()
    copy = seconds_of(lambda: target.copy_(source)) * scale
    digest = hashlib.sha256()
    mine = memoryview(source.numpy())[: sample // 2]
    sha256 = seconds_of(lambda: digest.update(mine)) * scale * 2
    return {"write": write, "read": read, "memcpy": copy, "sha256": sha256}
