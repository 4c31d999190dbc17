"""Naming and deleting of checkpoints, so that a kill at any instruction loses none.

write .iter_N.writing, its manifest last      no reader sees it yet
rename it to iter_N                           replaces an older one of its step in one operation
write the tracker                             a resume finds the newest without it too
delete those not kept                         each is renamed first, so it is complete or absent
"""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.checkpoint.candidates import steps_of_run
from megatron_sorted.checkpoint.layout import (
    COMPLETE,
    LEFTOVER,
    TRACKER,
    complete_directory,
    iteration_directory,
    steps_to_remove,
    writing_directory,
)
from megatron_sorted.checkpoint.manifest import MANIFEST
from megatron_sorted.files import (
    discard_tree,
    exchange,
    remove_tree,
    sync_directory,
    take_place,
    write_text_atomically,
)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a run are kept.

    Attributes:
        retain: Number of the newest that are kept; None for all.
        interval: Steps that are a multiple of it are kept too.
    """

    retain: int | None = None
    interval: int | None = None


def publish(root: Path, step: int, manifest: str, run_id: str | None, keep: Retention) -> list[str]:
    """Publish the checkpoint in ``writing_directory``; return notes for the user.

    Args:
        root: Directory of all checkpoints.
        step: The checkpoint's step.
        manifest: Text of its manifest.
        run_id: The run; only its own older checkpoints are deleted.
        keep: Which of them are kept.

    Raises:
        OSError: It could not be renamed to its final name; earlier checkpoints are unchanged. Later
            failures are notes.
    """
    partial = writing_directory(root, step)
    write_text_atomically(partial / MANIFEST, manifest)
    sync_directory(partial)
    notes = [name_checkpoint(root, step)]
    try:
        write_text_atomically(root / TRACKER, str(step))
    except OSError as error:
        # a resume finds the checkpoint without it, but deleting others would be a risk
        return [
            *filter(None, notes),
            f"{root / TRACKER}: could not be written ({error.strerror or error})",
        ]
    own = steps_of_run(root, run_id) if keep.retain is not None else []
    for old in steps_to_remove(own, step, keep.retain, keep.interval):
        try:
            notes.append(remove_checkpoint(root, old))
        except OSError as error:  # it is complete, and the next save tries again
            notes.append(
                f"the checkpoint of step {old} could not be removed ({error.strerror or error})"
            )
    return [note for note in notes if note]


def name_checkpoint(root: str | Path, step: int) -> str | None:
    """Rename the checkpoint in ``writing_directory`` to its final name; return a note, if any.

    A checkpoint of the same step is replaced. At every moment ``checkpoint_directory`` finds one of
    the two: names are exchanged in one operation, or the new one is renamed to complete before the
    old one is renamed.

    Raises:
        OSError: It cannot be renamed. The old one is unchanged.
    """
    partial, final = writing_directory(root, step), iteration_directory(root, step)
    old = partial
    if not os.path.lexists(final):
        os.rename(partial, final)
    elif not exchange(partial, final):
        complete, old = complete_directory(root, step), _free_name(root, step)
        os.rename(partial, complete)
        try:
            take_place(complete, final, old)
        except OSError:
            if os.path.lexists(final):  # otherwise the complete one is the only one
                os.rename(complete, partial)
            raise
    sync_directory(Path(root))
    return _remove_old(old, final)


def _free_name(root: str | Path, step: int) -> Path:
    """Return a free name for a directory to delete.

    Leftovers of a killed run are deleted; a name whose leftover cannot be deleted is skipped.
    """
    for number in itertools.count():
        name = Path(root) / f".iter_{step:07d}.removing{number or ''}"
        discard_tree(name)
        if not os.path.lexists(name):
            return name
    raise AssertionError("unreachable")


def _remove_old(old: Path, final: Path) -> str | None:
    """Delete the directory or link ``old``, which was ``final`` before; return a note, if any."""
    if not os.path.lexists(old):
        return None
    target = os.readlink(old) if old.is_symlink() else None
    try:
        remove_tree(old)
    except OSError as error:
        return f"{old}: could not be deleted ({error.strerror or error}); the next run tries again"
    if target is None:
        return None
    return f"{final} was a link: the link was removed, the files in {target} are as they were"


def finish_publishing(root: str | Path) -> None:
    """Rename complete checkpoints that a kill left without their final names.

    Only the run that holds the directory's lock may call it.
    """
    for path in Path(root).iterdir():
        if match := COMPLETE.fullmatch(path.name):
            final = iteration_directory(root, int(match[1]))
            if os.path.lexists(final):
                take_place(path, final, _free_name(root, int(match[1])))
            else:
                os.rename(path, final)


def remove_leftovers(root: str | Path) -> None:
    """Delete leftovers of a run that was killed while it saved or deleted.

    Only the run that holds the directory's lock may call it.
    """
    finish_publishing(root)
    for path in Path(root).iterdir():
        if LEFTOVER.fullmatch(path.name):
            discard_tree(path)


def remove_checkpoint(root: str | Path, step: int) -> str | None:
    """Delete a checkpoint and return a note, if any.

    A kill during the deletion never leaves a checkpoint that looks complete. If the checkpoint is a
    link, only the link is deleted: its target may be another run's.

    Raises:
        OSError: It cannot be renamed, and is unchanged.
    """
    directory, old = iteration_directory(root, step), _free_name(root, step)
    directory.rename(old)
    return _remove_old(old, directory)
