"""The directory layout of checkpoints: Megatron's, each checkpoint with a manifest.

SAVE/latest_checkpointed_iteration.txt  step of the newest complete checkpoint; written last
SAVE/iter_0000100/                      torch_dist shards, .metadata, metadata.json, common.pt
SAVE/iter_0000100/manifest.json         description and the hash of every file (manifest.py)
SAVE/iter_0000100/tokenizer/            the tokenizer's files
SAVE/iter_0000100/huggingface/          config.json and generation_config.json of an imported model
SAVE/iter_0000000/                      an imported model: weights only, from which a run starts
SAVE/.iter_0000200.writing/             an incomplete checkpoint; the next run removes it
SAVE/.iter_0000200.complete/            a complete one about to replace another of its step, where
                                        the file system cannot exchange names
SAVE/.iter_0000050.removing/            one that is being deleted; the next run removes it
"""

import os
import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = re.compile(r"iter_([0-9]{7}|[1-9][0-9]{7,17})")
COMPLETE = re.compile(r"\.iter_([0-9]{7}|[1-9][0-9]{7,17})\.complete")
AVERAGED = "averaged"
"""Prefix of the names of averaged weights: ``averaged.NAME`` is the average of weight NAME."""

TOKENIZER, HUGGING_FACE = "tokenizer", "huggingface"
"""Directories whose files are copied from checkpoint to checkpoint."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "prompt_form.json",
)
LEFTOVER = re.compile(
    r"\.iter_[0-9]{7,}\.(writing|removing[0-9]*)|\.(latest_checkpointed_iteration|run|stopped|evaluation)"
    r"\.[0-9]+\.(txt|json)"
)


def iteration_directory(root: str | Path, step: int) -> Path:
    """Return the directory of the checkpoint of ``step``."""
    return Path(root) / f"iter_{step:07d}"


def writing_directory(root: str | Path, step: int) -> Path:
    """Return the directory into which the checkpoint of ``step`` is written."""
    return Path(root) / f".iter_{step:07d}.writing"


def complete_directory(root: str | Path, step: int) -> Path:
    """Return the directory of a complete checkpoint of ``step`` before its final rename."""
    return Path(root) / f".iter_{step:07d}.complete"


def saved_steps(root: str | Path) -> list[int]:
    """Return the steps of the checkpoints in ``root``, newest first."""
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = (pattern.fullmatch(name) for name in names for pattern in (ITERATION, COMPLETE))
    return sorted({int(match[1]) for match in matches if match}, reverse=True)


def tokenizer_files_in(directory: Path) -> dict[str, Path]:
    """Return {name within a checkpoint: path} of a Hugging Face directory's tokenizer files."""
    paths = {
        path for pattern in TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()
    }
    return {f"{TOKENIZER}/{path.relative_to(directory).as_posix()}": path for path in sorted(paths)}


def checkpoint_directory(root: str | Path, step: int) -> Path:
    """Return the directory of the checkpoint of ``step``, under its final name or not yet."""
    complete = complete_directory(root, step)
    return complete if complete.is_dir() else iteration_directory(root, step)


def steps_to_remove(
    steps: list[int], newest: int, retain: int | None, interval: int | None
) -> list[int]:
    """Return the steps of the checkpoints to delete.

    The ``retain`` newest, ``newest`` itself and multiples of ``interval`` are kept.

    >>> steps_to_remove([400, 300, 200, 100], newest=400, retain=1, interval=200)
    [300, 100]

    Args:
        steps: Steps of all checkpoints.
        newest: Step of the checkpoint just saved; checkpoints of higher steps belong to an earlier
            run and count as older.
        retain: Number of checkpoints to keep; None for all.
        interval: Interval of steps whose checkpoints are always kept; None for none.
    """
    if retain is None:
        return []
    by_age = sorted(steps, key=lambda step: (step <= newest, step), reverse=True)
    return [
        step
        for step in by_age[retain:]
        if step != newest and not (interval and step % interval == 0)
    ]
