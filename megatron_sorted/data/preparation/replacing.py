"""Indexed files take their names together: at every moment the old pair or the new one can be opened.

A pair is first written as PREFIX.bin.partial and PREFIX.idx.partial, then, both on disk, called
PREFIX.bin.complete and PREFIX.idx.complete. Without PREFIX.idx, which is removed next, these are the
data: whoever opens them gives them their names, where a kill has left that undone.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.files import sync_directory, sync_file

ENDINGS = ("bin", "idx")  # in this order: an .idx.complete says that both are


def publish(prefixes: Sequence[str]) -> None:
    """Give pairs that are written their names, in place of those that were there.

    An index is removed before its tokens are replaced: it must never stand beside another's.

    Raises:
        OSError: The disk failed, or a file cannot be renamed.
    """
    for prefix in prefixes:
        for ending in ENDINGS:
            sync_file(f"{prefix}.{ending}.partial")
    for prefix in prefixes:
        for ending in ENDINGS:
            os.replace(f"{prefix}.{ending}.partial", f"{prefix}.{ending}.complete")
        sync_directory(Path(prefix).absolute().parent)
    for prefix in prefixes:
        Path(f"{prefix}.idx").unlink(missing_ok=True)
    for prefix in prefixes:
        _name(prefix)


def _name(prefix: str) -> None:
    for ending in ENDINGS:
        with contextlib.suppress(
            FileNotFoundError
        ):  # another process that opens the data was first
            os.replace(f"{prefix}.{ending}.complete", f"{prefix}.{ending}")
    sync_directory(Path(prefix).absolute().parent)


def finish_interrupted(prefix: str) -> None:
    """Finish what ``publish`` was killed in, if it was.

    Raises:
        DataError: It cannot be finished here.
    """
    if os.path.exists(f"{prefix}.idx") or not os.path.exists(f"{prefix}.idx.complete"):
        return
    try:
        _name(prefix)
    except OSError as error:
        raise DataError(
            f"{prefix}.idx.complete: megatron-sorted prepare was ended before this had its name, and it cannot be renamed "
            f"here ({error.strerror}). Make the folder writable, or prepare the data again."
        ) from error


def remove_leftovers(prefix: str) -> None:
    """Remove what an earlier writer left under names of its own; a pair that only lacks its names gets them."""
    finish_interrupted(prefix)
    remove_partial(prefix)
    for ending in ENDINGS:
        Path(f"{prefix}.{ending}.complete").unlink(missing_ok=True)


def remove_partial(prefix: str) -> None:
    """Remove what was not written to its end."""
    for ending in ENDINGS:
        Path(f"{prefix}.{ending}.partial").unlink(missing_ok=True)
