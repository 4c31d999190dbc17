"""Where a checkpoint's files lie: Megatron's directory layout with a description of the run beside it.

    SAVE/latest_checkpointed_iteration.txt    number of the newest complete checkpoint; written last
    SAVE/iter_0000100/                        torch_dist shards, .metadata, metadata.json, common.pt
    SAVE/iter_0000100/run.json                settings and progress, readable without torch
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.run import Settings

TRACKER = "latest_checkpointed_iteration.txt"
DESCRIPTION = "run.json"
# What must agree between a checkpoint and the run that loads it: the shape of the network.
SHAPE_FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "group_query_attention", "num_query_groups",
    "normalization", "swiglu", "disable_bias_linear", "add_qkv_bias", "qk_layernorm", "position_embedding_type", "rotary_base",
    "rotary_percent", "untie_embeddings_and_output_weights", "num_experts", "vocab_size",
)
# These name parameters, so they must agree too; exits that share norm and head may change freely.
OWN_PART_FIELDS = ("use_exit_norm", "untie_exit_output_weights")


@dataclass(frozen=True)
class Progress:
    """How far training was when a checkpoint was taken."""

    step: int
    samples: int


def iteration_directory(root: str | Path, step: int) -> Path:
    """Returns the directory of the checkpoint of ``step``."""
    return Path(root) / f"iter_{step:07d}"


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def latest_checkpoint(root: str | Path) -> Path | None:
    """Returns the directory the tracker file names, or None where there is no tracker.

    Raises:
        CheckpointError: The tracker is unreadable or names a directory that is missing or incomplete.
    """
    tracker = Path(root) / TRACKER
    if not tracker.exists():
        return None
    word = tracker.read_text(encoding="utf-8").strip()
    if not word.isdigit():
        raise CheckpointError(f"{tracker}: {word[:40]!r} is not an iteration number. Write the number of a checkpoint of {root} into it.")
    directory = iteration_directory(root, int(word))
    for name in (DESCRIPTION, "metadata.json", ".metadata"):
        if not (directory / name).exists():
            raise CheckpointError(
                f"{directory}: {name} is missing, so the checkpoint that {tracker} names is incomplete. "
                f"Write the number of a complete checkpoint into {tracker}, or restore the directory.")
    return directory


def read_description(directory: Path) -> dict[str, Any]:
    """Returns the description of a checkpoint: {"settings": ..., "progress": ..., "vocab_size": ...}.

    Raises:
        CheckpointError: It is not readable.
    """
    path = directory / DESCRIPTION
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error}). Restore the file, or load another checkpoint.") from error


def check_same_shape(directory: Path, settings: Settings, shape: dict[str, Any]) -> None:
    """Returns nothing if the checkpoint holds a network of the shape the run asks for.

    Args:
        directory: The checkpoint.
        settings: The run, for messages.
        shape: {field: value} of the run, with defaults resolved (``training.describe.network_shape``).

    Raises:
        CheckpointError: Naming every field that differs.
    """
    saved = read_description(directory)["shape"]
    different = [name for name in (*SHAPE_FIELDS, *OWN_PART_FIELDS) if saved.get(name) != shape.get(name)]
    if settings.use_exit_norm or settings.untie_exit_output_weights:
        different += [name for name in ("exit_layer_nums",) if saved.get(name) != shape.get(name)]
    if different:
        rows = "; ".join(
            f"--{name.replace('_', '-')}: {saved.get(name)} in the checkpoint, {shape.get(name)} in this run" for name in different)
        raise CheckpointError(f"{directory}: made with other sizes. {rows}. Use the checkpoint's values, or train anew without --load.")
