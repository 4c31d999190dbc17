"""Directories that appear complete or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sorted.checkpoint.layout import saved_steps
from megatron_sorted.errors import CheckpointError
from megatron_sorted.files import discard_tree, exchange, is_inside, sync_directory, take_place

SLACK_BYTES = 16 << 20  # descriptions, tokenizer, overhead of the file system


def check_destination(
    destination: Path, overwrite: bool, num_bytes: int, source: Path | None = None
) -> None:
    """Check that ``num_bytes`` can be written to a directory and that no run is replaced.

    Args:
        destination: The directory.
        overwrite: Whether an existing directory may be replaced.
        num_bytes: Number of bytes to write.
        source: The directory that is converted.

    Raises:
        CheckpointError: The directory exists and is not empty, or what is in it may not be
            replaced, or the disk has too little space.
    """
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file. Give a directory.")
    if destination.is_dir() and any(destination.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"{destination}: exists and is not empty. Give another directory, or --overwrite "
                "to replace it."
            )
        _check_replaceable(destination, source)
    parent = next(path for path in destination.absolute().parents if path.is_dir())
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{destination}: {parent} cannot be written. Give another directory.")
    free = shutil.disk_usage(parent).free
    if free < num_bytes + SLACK_BYTES:
        raise CheckpointError(
            f"{destination}: {(num_bytes + SLACK_BYTES) / 1e6:,.0f} MB are needed and "
            f"{free / 1e6:,.0f} MB are free on the disk of {parent}. Make room, or give a "
            "directory on another disk."
        )


def _check_replaceable(destination: Path, source: Path | None) -> None:
    """Check that a directory to replace is neither the source of the new one nor a run's.

    Raises:
        CheckpointError: It is one of the two.
    """
    if source is not None and is_inside(source, destination):
        raise CheckpointError(
            f"{destination}: --overwrite would replace {source}, the model to convert. Give "
            "another directory."
        )
    if step := max(saved_steps(destination), default=0):
        raise CheckpointError(
            f"{destination}: holds checkpoints of a run up to step {step}, which --overwrite does "
            "not replace. Give another directory, or remove it yourself."
        )


@contextmanager
def staged_directory(
    destination: Path, overwrite: bool, num_bytes: int, source: Path | None = None
) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``destination`` if the block ends without an error.

    It lies beside ``destination`` and is removed after an error. A directory that is replaced
    keeps its name until the new one is complete; if ``destination`` is a link, its target is
    replaced.

    Raises:
        CheckpointError: `check_destination` fails, or the disk fills up or fails meanwhile.
    """
    given, destination = destination, Path(os.path.realpath(destination))
    staged, replaced = (
        destination.with_name(f".{destination.name}.{state}") for state in ("writing", "removing")
    )
    # A process may have been killed between two renames, where names cannot be swapped.
    if replaced.is_dir() and not destination.exists():
        replaced.rename(destination)
    check_destination(given, overwrite, num_bytes, source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    discard_tree(staged)  # left by a conversion that was killed
    discard_tree(replaced)
    try:
        staged.mkdir()
        yield staged
        sync_directory(staged)
        if not os.path.lexists(destination):
            os.rename(staged, destination)
        elif not exchange(staged, destination):
            take_place(staged, destination, replaced)
        sync_directory(destination.parent)
        discard_tree(replaced)
    except OSError as error:
        full = (
            " The disk is full: make room, or give a directory on another one."
            if error.errno == errno.ENOSPC
            else ""
        )
        state = "nothing was left there" + (
            ", and what was there before is unchanged" if destination.exists() else ""
        )
        raise CheckpointError(
            f"{given}: could not be written ({error.strerror or error}); {state}.{full}"
        ) from error
    finally:
        discard_tree(staged)
