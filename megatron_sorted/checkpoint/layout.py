"""Where checkpoints lie: Megatron's directory layout, each checkpoint with a manifest beside the shards.

    SAVE/latest_checkpointed_iteration.txt    number of the newest complete checkpoint; written last
    SAVE/iter_0000100/                        torch_dist shards, .metadata, metadata.json, common.pt
    SAVE/iter_0000100/manifest.json           what it is and the hash of every file, readable without torch (manifest.py)
    SAVE/iter_0000100/tokenizer/              the tokenizer's files
    SAVE/iter_0000100/huggingface/            config.json and generation_config.json of the model that was imported, if one was
    SAVE/iter_0000000/                        an imported model: weights only, with which a run starts
    SAVE/.iter_0000200.writing/               a checkpoint that is not complete; removed by the next run
    SAVE/.iter_0000200.complete/              a complete one about to replace another of its step, where names cannot be swapped
    SAVE/.iter_0000050.removing/              one that is being deleted; removed by the next run
"""

import itertools
import os
import re
from pathlib import Path

from megatron_sorted.files import discard_tree, exchange, remove_tree, sync_directory

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = re.compile(r"iter_([0-9]{7}|[1-9][0-9]{7,17})")
COMPLETE = re.compile(r"\.iter_([0-9]{7}|[1-9][0-9]{7,17})\.complete")
TOKENIZER, HUGGING_FACE = "tokenizer", "huggingface"  # directories whose files travel from checkpoint to checkpoint
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "tokenizer.model.v*",
    "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "generation_config.json",
)
LEFT_OVER = re.compile(r"\.iter_[0-9]{7,}\.(writing|removing[0-9]*)|\.(latest_checkpointed_iteration|run|stopped|evaluation)"
                       r"\.[0-9]+\.(txt|json)")


def iteration_directory(root: str | Path, step: int) -> Path:
    """Returns the directory of the checkpoint of ``step``."""
    return Path(root) / f"iter_{step:07d}"


def writing_directory(root: str | Path, step: int) -> Path:
    """Returns the directory in which the checkpoint of ``step`` lies until it is complete."""
    return Path(root) / f".iter_{step:07d}.writing"


def complete_directory(root: str | Path, step: int) -> Path:
    """Return the directory of a complete checkpoint of ``step`` that does not have its name yet."""
    return Path(root) / f".iter_{step:07d}.complete"


def saved_steps(root: str | Path) -> list[int]:
    """Returns the steps of the checkpoints in ``root``, newest first."""
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = (pattern.fullmatch(name) for name in names for pattern in (ITERATION, COMPLETE))
    return sorted({int(match[1]) for match in matches if match}, reverse=True)


def tokenizer_files_in(directory: Path) -> dict[str, Path]:
    """Returns the files in a Hugging Face directory that make up its tokenizer, by name within a checkpoint."""
    found = {path for pattern in TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()}
    return {f"{TOKENIZER}/{path.relative_to(directory).as_posix()}": path for path in sorted(found)}


def checkpoint_directory(root: str | Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` is, which a kill may have left under another name."""
    complete = complete_directory(root, step)
    return complete if complete.is_dir() else iteration_directory(root, step)


def publish_checkpoint(root: str | Path, step: int) -> str | None:
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
            _take_place(complete, final, old)
        except OSError:
            os.rename(complete, aside)
            raise
    sync_directory(Path(root))
    return _remove_old(old, final)


def _take_place(complete: Path, final: Path, old: Path) -> None:
    """Rename ``final`` to ``old`` and ``complete`` to ``final``; if that fails, undo it and raise."""
    os.rename(final, old)
    try:
        os.rename(complete, final)
    except OSError:
        os.rename(old, final)
        raise


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
                _take_place(path, final, _free_name(root, int(match[1])))
            else:
                os.rename(path, final)


def remove_left_overs(root: str | Path) -> None:
    """Delete what a run that was killed while it saved or deleted has left. Only the run that holds the directory may call it."""
    finish_publishing(root)
    for path in Path(root).iterdir():
        if LEFT_OVER.fullmatch(path.name):
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


def steps_to_remove(steps: list[int], newest: int, retain: int | None, interval: int | None) -> list[int]:
    """Returns the checkpoints that are not kept: all but the ``retain`` newest, ``newest`` itself and multiples of ``interval``.

    Args:
        steps: Of all checkpoints.
        newest: The one just saved; checkpoints of higher steps belong to an earlier run and count as older.
        retain: How many to keep; None for all.
        interval: Every multiple of it is kept as well.
    """
    if retain is None:
        return []
    by_age = sorted(steps, key=lambda step: (step <= newest, step), reverse=True)
    return [step for step in by_age[retain:] if step != newest and not (interval and step % interval == 0)]
