"""A directory that appears complete or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sorted.checkpoint.layout import saved_steps
from megatron_sorted.errors import CheckpointError
from megatron_sorted.files import discard_tree, exchange, is_inside, sync_directory, take_place

SLACK_BYTES = 16 << 20  # descriptions, tokenizer and what a file system takes for itself


def check_destination(
    destination: Path, overwrite: bool, num_bytes: int, source: Path | None = None
) -> None:
    """Check that ``num_bytes`` can be written to a new directory, and that nothing of another kind is lost by it.

    Args:
        destination: The directory.
        overwrite: Whether one that is there may be replaced.
        num_bytes: What is written.
        source: What it is made of.

    Raises:
        CheckpointError: The directory exists and is not empty, or what is in it may not be replaced, or the disk has too little space.
    """
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file. Give a directory.")
    if destination.is_dir() and any(destination.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"{destination}: exists and is not empty. Give another directory, or --overwrite to replace it."
            )
        _check_replaceable(destination, source)
    parent = next(path for path in destination.absolute().parents if path.is_dir())
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{destination}: {parent} cannot be written. Give another directory.")
    free = shutil.disk_usage(parent).free
    if free < num_bytes + SLACK_BYTES:
        raise CheckpointError(
            f"{destination}: {(num_bytes + SLACK_BYTES) / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free on "
            f"the disk of {parent}. Make room, or give a directory on another disk."
        )


def _check_replaceable(destination: Path, source: Path | None) -> None:
    """Check that a directory that is to be replaced is neither what the new one is made of nor a run's.

    Raises:
        CheckpointError: It is one of them.
    """
    if source is not None and is_inside(source, destination):
        raise CheckpointError(
            f"{destination}: --overwrite would replace {source}, of which it is made. Give another directory."
        )
    if step := max(saved_steps(destination), default=0):
        raise CheckpointError(
            f"{destination}: holds checkpoints of a run up to step {step}, which --overwrite does not replace. "
            "Give another directory, or remove it yourself."
        )


@contextmanager
def staged_directory(
    destination: Path, overwrite: bool, num_bytes: int, source: Path | None = None
) -> Iterator[Path]:
    """Yield a directory beside ``destination`` that takes its name when the block ends well, and is removed when it does not.

    A directory that is replaced keeps its name until the new one is complete. Of a link, what it
    points to is replaced.

    Raises:
        CheckpointError: As `check_destination`; or the disk filled up or failed meanwhile.
    """
    named, destination = destination, Path(os.path.realpath(destination))
    aside, old = (
        destination.with_name(f".{destination.name}.{state}") for state in ("writing", "removing")
    )
    if (
        old.is_dir() and not destination.exists()
    ):  # killed between two renames, where names cannot be swapped
        old.rename(destination)
    check_destination(named, overwrite, num_bytes, source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    discard_tree(aside)  # of a conversion that was killed
    discard_tree(old)
    try:
        aside.mkdir()
        yield aside
        sync_directory(aside)
        if not os.path.lexists(destination):
            os.rename(aside, destination)
        elif not exchange(aside, destination):
            take_place(aside, destination, old)
        sync_directory(destination.parent)
        discard_tree(old)
    except OSError as error:
        full = (
            " The disk is full: make room, or give a directory on another one."
            if error.errno == errno.ENOSPC
            else ""
        )
        was = "nothing was left there" + (
            ", and what was there before is as it was" if destination.exists() else ""
        )
        raise CheckpointError(
            f"{named}: could not be written ({error.strerror or error}); {was}.{full}"
        ) from error
    finally:
        discard_tree(aside)
