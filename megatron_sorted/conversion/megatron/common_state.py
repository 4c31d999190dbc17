"""What all ranks of a ``torch_dist`` checkpoint share: arguments, step, settings of the optimizer.

megatron-core up to 0.18 writes it as a file of its own, from 0.19 on as an object beside the
weights. Both are files of torch.save, and both are read without running code of the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.plain_objects import load_plain
from megatron_sorted.checkpoint.restricted_pickle import StoredPiece
from megatron_sorted.conversion.megatron.saved_tensors import SavedFile
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown

COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
PARTS = "common_state/"
MAX_BYTES = 256 << 20
"""Largest size of the object; that of a model of a thousand layers takes less than a megabyte."""


def read_common_states(
    directory: Path, objects: Mapping[str, StoredPiece | None]
) -> dict[str, dict[str, Any]]:
    """Return {file or object: what all ranks share} of a checkpoint; empty if it has neither.

    Args:
        directory: The checkpoint.
        objects: The objects that its metadata lists, and where they lie.

    Raises:
        CheckpointError: One of them is missing, damaged, larger than any real one or in several
            parts, or holds a class that is not on the list of plain ones.
    """
    states = {}
    if (directory / COMMON_FILE).exists():
        states[COMMON_FILE] = _file(directory / COMMON_FILE)
    if parts := sorted(name for name in objects if name.startswith(PARTS)):
        if parts != [COMMON_OBJECT]:
            raise CheckpointError(
                f"{shown(directory)}: its metadata lists {shown(', '.join(parts))}, but Megatron "
                f"writes one object, {COMMON_OBJECT}. The metadata is damaged, or of another "
                "format; save the checkpoint again with Megatron-LM."
            )
        states[COMMON_OBJECT] = _object(directory, objects[COMMON_OBJECT])
    return states


def _file(path: Path) -> dict[str, Any]:
    content = load_plain(path, str(path))
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a dict; it is no common part of a save."
        )
    return content


def _object(directory: Path, piece: StoredPiece | None) -> dict[str, Any]:
    label = f"{shown(directory)}: {COMMON_OBJECT}"
    if piece is None:
        raise CheckpointError(
            f"{label}: the metadata does not say where it lies. Copy the directory again."
        )
    label += f" in {shown(piece.file, 60)}"
    if piece.num_bytes > MAX_BYTES:
        raise CheckpointError(
            f"{label}: is of {piece.num_bytes:,} bytes, more than any arguments take "
            f"({MAX_BYTES:,} at most). The metadata is damaged; copy the directory again."
        )
    path = directory / piece.file
    if not path.is_file():
        raise CheckpointError(f"{label}: the file is missing. Copy the whole directory again.")
    size, end = path.stat().st_size, piece.offset + piece.num_bytes
    if size < end:
        raise CheckpointError(
            f"{label}: the file has {size} bytes, but it lies up to byte {end}; the file was cut "
            "off. Copy it again."
        )
    content = SavedFile(path, piece, label).content
    # Megatron wraps the value of every object that is no tensor in a list.
    if not (isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict)):
        raise CheckpointError(
            f"{label}: holds {_kind(content)}, not a list of one dict; it is no common part of a "
            "save. Copy it again."
        )
    return content[0]


def _kind(content: Any) -> str:
    if isinstance(content, list):
        return f"a list of {len(content)} ({', '.join(type(v).__name__ for v in content[:3])})"
    return f"a {type(content).__name__}"
