"""Where checkpoints lie: Megatron's directory layout, each checkpoint with a manifest beside the shards.

    SAVE/latest_checkpointed_iteration.txt    number of the newest complete checkpoint; written last
    SAVE/iter_0000100/                        torch_dist shards, .metadata, metadata.json, common.pt
    SAVE/iter_0000100/manifest.json           what it is and the hash of every file, readable without torch (manifest.py)
    SAVE/iter_0000100/tokenizer/              the tokenizer's files
    SAVE/iter_0000100/huggingface/            config.json and generation_config.json of the model that was imported, if one was
    SAVE/iter_0000000/                        an imported model: weights only, with which a run starts
    SAVE/.iter_0000200.writing/               a checkpoint that is not complete; removed by the next run
    SAVE/.iter_0000050.removing/              one that --save-retain is deleting; removed by the next run
"""

import os
import re
import shutil
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = re.compile(r"iter_(\d{7,})")
TOKENIZER, HUGGING_FACE = "tokenizer", "huggingface"  # directories whose files travel from checkpoint to checkpoint
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "tokenizer.model.v*",
    "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "generation_config.json",
    "prompt_form.json",
)
LEFT_OVER = re.compile(r"\.iter_\d{7,}\.(writing|removing)")


def iteration_directory(root: str | Path, step: int) -> Path:
    """Returns the directory of the checkpoint of ``step``."""
    return Path(root) / f"iter_{step:07d}"


def writing_directory(root: str | Path, step: int) -> Path:
    """Returns the directory in which the checkpoint of ``step`` lies until it is complete."""
    return Path(root) / f".iter_{step:07d}.writing"


def saved_steps(root: str | Path) -> list[int]:
    """Returns the steps of the checkpoints in ``root``, newest first."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted((int(match[1]) for match in map(ITERATION.fullmatch, names) if match), reverse=True)


def tokenizer_files_in(directory: Path) -> dict[str, Path]:
    """Returns the files in a Hugging Face directory that make up its tokenizer, by name within a checkpoint."""
    found = {path for pattern in TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()}
    return {f"{TOKENIZER}/{path.relative_to(directory).as_posix()}": path for path in sorted(found)}


def remove_left_overs(root: str | Path) -> None:
    """Deletes what a run that was killed while it saved or deleted has left. Only the run that holds the directory may call it."""
    for path in Path(root).iterdir():
        if LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def remove_checkpoint(root: str | Path, step: int) -> None:
    """Deletes a checkpoint; killed in the middle, it never leaves one that looks complete."""
    directory = iteration_directory(root, step)
    aside = directory.with_name(f".{directory.name}.removing")
    shutil.rmtree(aside, ignore_errors=True)
    directory.rename(aside)
    shutil.rmtree(aside)


def sync_directory(path: Path) -> None:
    """Waits until the names in a directory are on disk, where the file system knows such a thing."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse; they order names themselves
    finally:
        os.close(handle)


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new one, never half of it, also after a loss of power."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


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
