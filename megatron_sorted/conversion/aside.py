"""A directory that appears complete or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sorted.errors import CheckpointError
from megatron_sorted.files import sync_directory

SLACK_BYTES = 16 << 20  # descriptions, tokenizer and what a file system takes for itself


def check_destination(destination: Path, overwrite: bool, num_bytes: int) -> None:
    """Returns nothing if ``num_bytes`` can be written to a new directory.

    Raises:
        CheckpointError: The directory exists and is not empty, or the disk has too little space.
    """
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file. Give a directory.")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise CheckpointError(f"{destination}: exists and is not empty. Give another directory, or --overwrite to replace it.")
    parent = next(path for path in destination.absolute().parents if path.is_dir())
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{destination}: {parent} cannot be written. Give another directory.")
    free = shutil.disk_usage(parent).free
    if free < num_bytes + SLACK_BYTES:
        raise CheckpointError(f"{destination}: {(num_bytes + SLACK_BYTES) / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free on "
                              f"the disk of {parent}. Make room, or give a directory on another disk.")


@contextmanager
def written_aside(destination: Path, overwrite: bool, num_bytes: int) -> Iterator[Path]:
    """Yields a directory beside ``destination`` that takes its name when the block ends well, and is removed when it does not.

    Raises:
        CheckpointError: As `check_destination`; or the disk filled up or failed meanwhile.
    """
    destination = destination.absolute()
    aside, old = (destination.with_name(f".{destination.name}.{state}") for state in ("writing", "removing"))
    if old.is_dir() and not destination.exists():  # killed between the two renames below
        old.rename(destination)
    check_destination(destination, overwrite, num_bytes)
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)  # of a conversion that was killed
    shutil.rmtree(old, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        sync_directory(aside)
        if destination.exists():
            destination.rename(old)
        aside.rename(destination)
        sync_directory(destination.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        full = " The disk is full: make room, or give a directory on another one." if error.errno == errno.ENOSPC else ""
        raise CheckpointError(f"{destination}: could not be written ({error.strerror or error}); nothing was left there.{full}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
