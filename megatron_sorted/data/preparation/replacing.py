"""Replacement of indexed files as a pair: at every moment the old or the new pair can be opened.

A pair is first written as PREFIX.bin.partial and PREFIX.idx.partial, then, when both are on disk,
renamed to PREFIX.bin.complete and PREFIX.idx.complete. Then PREFIX.idx is removed; from that moment
these are the data: if a kill prevented the final renaming, whoever opens them does it.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.files import sync_directory, sync_file

ENDINGS = ("bin", "idx")
"""In this order: an .idx.complete shows that both files are complete."""


def publish(prefixes: Sequence[str]) -> None:
    """Give written pairs their names, in place of existing ones.

    An index is removed before its tokens are replaced: it must never stand beside the tokens of
        another.

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
        _rename_complete(prefix)


def _rename_complete(prefix: str) -> None:
    for ending in ENDINGS:
        # another process that opens the data may have been first
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{prefix}.{ending}.complete", f"{prefix}.{ending}")
    sync_directory(Path(prefix).absolute().parent)


def finish_interrupted(prefix: str) -> None:
    """Finish a ``publish`` that was killed.

    Raises:
        DataError: It cannot be finished here.
    """
    if os.path.exists(f"{prefix}.idx") or not os.path.exists(f"{prefix}.idx.complete"):
        return
    try:
        _rename_complete(prefix)
    except OSError as error:
        raise DataError(
            f"{prefix}.idx.complete: megatron-sorted prepare ended before it renamed this file, "
            f"and it cannot be renamed here ({error.strerror}). Make the folder writable, or "
            "prepare the data again."
        ) from error


def remove_leftovers(prefix: str) -> None:
    """Remove temporary files of an earlier writer.

    A complete pair that only lacks its names gets them.
    """
    finish_interrupted(prefix)
    remove_partial(prefix)
    for ending in ENDINGS:
        Path(f"{prefix}.{ending}.complete").unlink(missing_ok=True)


def remove_partial(prefix: str) -> None:
    """Remove files that were not written completely."""
    for ending in ENDINGS:
        Path(f"{prefix}.{ending}.partial").unlink(missing_ok=True)
