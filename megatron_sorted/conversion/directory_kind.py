"""The kind of model that a directory holds, judged by the names of its files. Needs no torch."""

from pathlib import Path
from typing import Literal

from megatron_sorted.checkpoint.layout import TRACKER, checkpoint_directory, saved_steps
from megatron_sorted.checkpoint.manifest import MANIFEST
from megatron_sorted.conversion.hugging_face.families import CONFIG_FILE
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown

Kind = Literal["hugging_face", "checkpoint", "checkpoints", "megatron"]


def is_hugging_face(path: str | Path) -> bool:
    """Return whether a directory is a Hugging Face model and not one of our checkpoints."""
    return (Path(path) / CONFIG_FILE).is_file() and not (Path(path) / MANIFEST).is_file()


def kind_of(path: Path) -> Kind:
    """Return the kind of model in an existing directory.

    Returns:
        "hugging_face" if it has a config.json, even if it also holds checkpoints; "checkpoint" for
        one of our checkpoints; "checkpoints" for a directory of them; "megatron" for what
        Megatron-LM, MindSpeed or EE-LLM saved.

    Raises:
        CheckpointError: It is none of these.
    """
    if is_hugging_face(path):
        return "hugging_face"
    if (path / MANIFEST).is_file():
        return "checkpoint"
    if any((checkpoint_directory(path, step) / MANIFEST).is_file() for step in saved_steps(path)):
        return "checkpoints"
    if any((path / name).is_file() for name in (TRACKER, "metadata.json")) or any(
        path.glob("mp_rank_*")
    ):
        return "megatron"
    entries = ", ".join(shown(entry.name, 60) for entry in sorted(path.iterdir())[:5])
    raise CheckpointError(
        f"{path}: neither a Hugging Face model ({CONFIG_FILE} and safetensors) nor a checkpoint "
        f"({TRACKER}, iter_*). It holds {entries or 'nothing'}."
    )
