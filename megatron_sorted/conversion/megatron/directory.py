"""Opening of Megatron checkpoints of every writer and format as one source of weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.layout import ITERATION, TRACKER, iteration_directory
from megatron_sorted.checkpoint.restricted_pickle import METADATA
from megatron_sorted.conversion.megatron.arguments import settings_of
from megatron_sorted.conversion.megatron.common_state import COMMON_FILE
from megatron_sorted.conversion.megatron.legacy_files import EMBEDDING, LegacyFiles
from megatron_sorted.conversion.megatron.legacy_layout import plain_arguments
from megatron_sorted.conversion.megatron.torch_dist_files import TorchDistFiles
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.json_text import read_json
from megatron_sorted.reading.shown import shown

RELEASE = "release"
MAX_METADATA_BYTES, MAX_DIGITS = 4 << 20, 18
KINDS = "our own or Megatron-LM's torch_dist checkpoints, and legacy mp_rank_* directories"


def find_megatron(path: Path, ckpt_step: int | None = None) -> Path:
    """Return the directory of one checkpoint: the path itself, or one in it.

    Args:
        path: A checkpoint, or the directory of several.
        ckpt_step: The checkpoint's step; by default the one that the tracker names.

    Raises:
        CheckpointError: There is no checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: is no directory. Give a checkpoint ({KINDS}), or the directory of several."
        )
    if (path / METADATA).exists() or any(path.glob("mp_rank_*")):
        if ckpt_step is not None and path.name != iteration_directory(path, ckpt_step).name:
            raise CheckpointError(
                f"--ckpt-step: {ckpt_step}, but {path} is one checkpoint. Leave the option out, or "
                "give the directory of all checkpoints."
            )
        return path
    if ckpt_step is not None:
        directory = iteration_directory(path, ckpt_step)
        if not directory.is_dir():
            raise CheckpointError(
                f"--ckpt-step: {ckpt_step}, but {path} holds no {directory.name}."
                f"{_checkpoints_in(path)}"
            )
        return directory
    try:
        tracked = (path / TRACKER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        hint = " It looks like a Hugging Face directory." if (path / "config.json").exists() else ""
        raise CheckpointError(
            f"{path}: holds neither {TRACKER} nor a checkpoint ({KINDS}).{hint}"
            f"{_checkpoints_in(path)}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / TRACKER}: not readable ({error}).") from error
    if tracked != RELEASE and not (re.fullmatch(r"[0-9]+", tracked) and len(tracked) <= MAX_DIGITS):
        raise CheckpointError(
            f"{path / TRACKER}: says {shown(repr(tracked), 60)}, which is neither a number nor "
            f"{RELEASE!r}."
        )
    directory = path / RELEASE if tracked == RELEASE else iteration_directory(path, int(tracked))
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: is missing, though {TRACKER} names it. Copy it too, or give another "
            "checkpoint's directory."
        )
    return directory


def _checkpoints_in(path: Path) -> str:
    """Return a sentence that names the last checkpoints in a directory; empty if it has none."""
    names = sorted(
        entry.name
        for entry in path.iterdir()
        if ITERATION.fullmatch(entry.name) or entry.name == RELEASE
    )
    return f" Give one of those in it: {', '.join(names[-5:])}." if names else ""


def _backend(directory: Path) -> str | None:
    """Return the storage format that metadata.json names; None if it names none."""
    path = directory / "metadata.json"
    if not path.is_file():
        return None
    metadata = read_json(path, "Copy it again.", CheckpointError, MAX_METADATA_BYTES)
    return metadata.get("sharded_backend") if isinstance(metadata, dict) else None


def _settings(arguments: dict[str, Any] | None, directory: Path) -> dict[str, Any] | None:
    """Return the settings that a checkpoint's arguments describe; None without arguments."""
    if arguments is None:
        return None
    try:
        return settings_of(arguments)
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{shown(directory)}: its arguments are not those of Megatron ({shown(error, 100)}). "
            "Copy it again."
        ) from error


def _agreed_settings(
    states: Mapping[str, Mapping[str, Any]], directory: Path
) -> dict[str, Any] | None:
    """Return the settings of a checkpoint's arguments; None if no place holds any.

    Megatron-LM 0.19 that saves over the files of an older one leaves that one's arguments there.

    Raises:
        CheckpointError: Two places describe different networks.
    """
    described = {
        place: settings
        for place, state in states.items()
        if (settings := _settings(plain_arguments(state.get("args")), directory)) is not None
    }
    if not described:
        return None
    (first, settings), *others = described.items()
    for place, other in others:
        for name in sorted(settings.keys() | other.keys()):
            one, another = (shown(repr(fields.get(name)), 60) for fields in (settings, other))
            if one != another:
                raise CheckpointError(
                    f"{shown(directory)}: {name} is {one} by {first} and {another} by {place}, so "
                    f"it holds files of two saves. Delete {COMMON_FILE} if the newer one is meant, "
                    "or copy the directory again."
                )
    return settings


def open_megatron(
    path: str | Path, ckpt_step: int | None = None
) -> tuple[TorchDistFiles | LegacyFiles, dict[str, Any] | None]:
    """Return the weights of a checkpoint of Megatron-LM, MindSpeed or EE-LLM, and its settings.

    The settings include those of exits; they are None if the checkpoint holds no arguments.

    Raises:
        CheckpointError: It is no checkpoint of a GPT model, is damaged, or describes a network that
            the settings cannot represent.
    """
    directory = find_megatron(Path(path), ckpt_step)
    if (directory / METADATA).exists():
        backend = _backend(directory)
        if backend not in (None, "torch_dist"):
            raise CheckpointError(
                f"{directory}: is stored as {shown(repr(backend), 60)}, which cannot be read. Load "
                "it in Megatron-LM and save it with --ckpt-format torch_dist."
            )
        source: TorchDistFiles | LegacyFiles = TorchDistFiles(directory)
        settings = _agreed_settings(source.common_states(), directory)
    elif any(directory.glob("mp_rank_*")):
        source = LegacyFiles(directory)
        settings = _settings(source.arguments, directory)
    else:
        raise CheckpointError(
            f"{directory}: holds neither {METADATA} nor mp_rank_* directories, so it is none of "
            f"{KINDS}."
        )
    if EMBEDDING not in source.tensors:
        some = ", ".join(shown(name, 60) for name in list(source.tensors)[:3])
        raise CheckpointError(
            f"{directory}: holds no {EMBEDDING} (but {some}, ...), so it is no GPT model of "
            "Megatron."
        )
    return source, settings
