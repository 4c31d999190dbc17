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

import os
import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = re.compile(r"iter_([0-9]{7}|[1-9][0-9]{7,17})")
COMPLETE = re.compile(r"\.iter_([0-9]{7}|[1-9][0-9]{7,17})\.complete")
TOKENIZER, HUGGING_FACE = (
    "tokenizer",
    "huggingface",
)  # directories whose files travel from checkpoint to checkpoint
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
    """Return the directory in which the checkpoint of ``step`` lies until it is complete."""
    return Path(root) / f".iter_{step:07d}.writing"


def complete_directory(root: str | Path, step: int) -> Path:
    """Return the directory of a complete checkpoint of ``step`` that does not have its name yet."""
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
    """Return the files in a Hugging Face directory that make up its tokenizer, by name within a checkpoint."""
    found = {
        path for pattern in TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()
    }
    return {f"{TOKENIZER}/{path.relative_to(directory).as_posix()}": path for path in sorted(found)}


def checkpoint_directory(root: str | Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` is, which a kill may have left under another name."""
    complete = complete_directory(root, step)
    return complete if complete.is_dir() else iteration_directory(root, step)


def steps_to_remove(
    steps: list[int], newest: int, retain: int | None, interval: int | None
) -> list[int]:
    """Return the checkpoints that are not kept: all but the ``retain`` newest, ``newest`` itself and multiples of ``interval``.

    Args:
        steps: Of all checkpoints.
        newest: The one just saved; checkpoints of higher steps belong to an earlier run and count as older.
        retain: How many to keep; None for all.
        interval: Every multiple of it is kept as well.
    """
    if retain is None:
        return []
    by_age = sorted(steps, key=lambda step: (step <= newest, step), reverse=True)
    return [
        step
        for step in by_age[retain:]
        if step != newest and not (interval and step % interval == 0)
    ]
