"""How a checkpoint gets its name and how one is deleted, so that a kill at any instruction loses none.

write .iter_N.writing, its manifest last      not there for anybody yet
name it iter_N                                takes the place of an older one of its step in one step
write the tracker                             a resume finds the newest without it, too
delete what is not kept                       each is renamed first, so that it is whole or gone
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
        retain: How many of the newest; None for all.
        interval: Those of steps that are a multiple of it as well.
    """

    retain: int | None = None
    interval: int | None = None


def publish(root: Path, step: int, manifest: str, run_id: str | None, keep: Retention) -> list[str]:
    """Make a checkpoint of what lies in ``writing_directory``; return notes for the user.

    Args:
        root: Directory of all checkpoints.
        step: Of this one.
        manifest: Its text.
        run_id: The run, whose own older checkpoints alone are deleted.
        keep: Which of them are not.

    Raises:
        OSError: It could not be given its name; those that were there are as they were. From then on nothing is raised.
    """
    aside = writing_directory(root, step)
    write_text_atomically(aside / MANIFEST, manifest)
    sync_directory(aside)
    notes = [name_checkpoint(root, step)]
    try:
        write_text_atomically(root / TRACKER, str(step))
    except OSError as error:  # a resume finds the checkpoint without it; deleting others on top would be too bold
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
    """Give the checkpoint of ``step`` that lies in ``writing_directory`` its name; return a note, if any.

    A checkpoint of the same step is replaced. At every moment one of the two is there under a name
    that ``checkpoint_directory`` finds: names are swapped in one step, or the new one is called
    complete before the old one is renamed.

    Raises:
        OSError: It cannot be renamed. The old one is as it was.
    """
    aside, final = writing_directory(root, step), iteration_directory(root, step)
    old = aside
    if not os.path.lexists(final):
        os.rename(aside, final)
    elif not exchange(aside, final):
        complete, old = complete_directory(root, step), _free_name(root, step)
        os.rename(aside, complete)
        try:
            take_place(complete, final, old)
        except OSError:
            if os.path.lexists(final):  # otherwise the complete one is all there is
                os.rename(complete, aside)
            raise
    sync_directory(Path(root))
    return _remove_old(old, final)


def _free_name(root: str | Path, step: int) -> Path:
    """Return a name for what is to be deleted; what lies there from a run that was killed is deleted, or passed by."""
    for number in itertools.count():
        name = Path(root) / f".iter_{step:07d}.removing{number or ''}"
        discard_tree(name)
        if not os.path.lexists(name):
            return name
    raise AssertionError("unreachable")


def _remove_old(old: Path, final: Path) -> str | None:
    """Delete what was renamed to ``old``; return what the user should know of it."""
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
    """Give checkpoints that a kill left complete their names. Only the run that holds the directory may call it."""
    for path in Path(root).iterdir():
        if match := COMPLETE.fullmatch(path.name):
            final = iteration_directory(root, int(match[1]))
            if os.path.lexists(final):
                take_place(path, final, _free_name(root, int(match[1])))
            else:
                os.rename(path, final)


def remove_leftovers(root: str | Path) -> None:
    """Delete what a run that was killed while it saved or deleted has left. Only the run that holds the directory may call it."""
    finish_publishing(root)
    for path in Path(root).iterdir():
        if LEFTOVER.fullmatch(path.name):
            discard_tree(path)


def remove_checkpoint(root: str | Path, step: int) -> str | None:
    """Delete a checkpoint and return a note, if any; killed in the middle, it never leaves one that looks complete.

    Of a checkpoint that is a link, the link is deleted: what it points to may be another run's.

    Raises:
        OSError: It cannot be renamed, and is as it was.
    """
    directory, aside = iteration_directory(root, step), _free_name(root, step)
    directory.rename(aside)
    return _remove_old(aside, directory)
