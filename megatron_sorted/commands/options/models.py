"""Directories of models on a command line, checked before anything slow is imported."""

from pathlib import Path

from megatron_sorted.errors import CheckpointError


def check_directories(*paths: Path | None) -> None:
    """Check that every given path is a directory; None stands for a model that is not given.

    Raises:
        CheckpointError: A path is not a directory.
    """
    for path in paths:
        if path is not None and not path.is_dir():
            raise CheckpointError(
                f"{path}: no such directory. Give a Hugging Face directory or one of checkpoints."
            )
