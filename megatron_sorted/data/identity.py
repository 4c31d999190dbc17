"""The identity of a run's data, kept in checkpoints, and readable differences between two."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from megatron_sorted.data.samples.blend_order import whole_parts
from megatron_sorted.data.samples.dataset import SAMPLE_ORDER
from megatron_sorted.errors import DataError
from megatron_sorted.settings.derived import data_blend, data_prefixes, split_ranges
from megatron_sorted.settings.run import Settings

WHOLE_BYTES = 256 << 20
"""Largest size of a .bin that is read from end to end."""
NUM_BLOCKS, BLOCK_BYTES = 256, 1 << 20
READERS = 8
SHOWN_DIGITS = 8


def data_identity(settings: Settings) -> dict[str, Any]:
    """Return everything that fixes which sample a run trains on at which position.

    That is: files and their contents, weights, share, length and seed. Names are without their
        folders, so
    that data may be moved. Reads the whole of every .idx and of every .bin up to 256 MiB, and 256
    MiB of larger ones (see :func:`fingerprint`): call it on one process.

    Raises:
        DataError: A file cannot be read.
    """
    blend = data_blend(settings)
    prefixes = () if settings.mock_data else data_prefixes(settings)
    paths = {Path(f"{prefix}.{ending}") for prefix in prefixes for ending in ("idx", "bin")}
    with ThreadPoolExecutor(READERS) as pool:
        fingerprints = dict(zip(paths, pool.map(fingerprint, paths), strict=True))
    return {
        "sample_order": SAMPLE_ORDER,
        "mock": settings.mock_data,
        "seed": settings.seed,
        "seq_length": settings.seq_length,
        "training_share": None if settings.mock_data else split_ranges(settings)[0][1],
        "files": [
            {
                "name": Path(prefix).name,
                "weight": None if blend is None else blend[position][0],
                **{ending: fingerprints[Path(f"{prefix}.{ending}")] for ending in ("idx", "bin")},
            }
            for position, prefix in enumerate(prefixes)
        ],
    }


def fingerprint(path: Path) -> dict[str, Any]:
    """Return the size of a file in bytes and a SHA-256 of its size and content.

    An .idx and a .bin of up to 256 MiB are read whole; of a larger .bin the content is 256 blocks
    of 1 MiB, evenly spaced, the first and the last included. So every change of size, and of the
    length, order or number of documents is detected, and every shift of the tokens; tokens that are
    overwritten in place in a larger .bin only if they lie in a block.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(f"{size}\n".encode())
        with open(path, "rb", buffering=0) as stream:
            for block in _blocks(stream, size, path.suffix == ".idx" or size <= WHOLE_BYTES):
                digest.update(block)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Data must stay readable while it is "
            "trained on."
        ) from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(stream: BinaryIO, size: int, whole: bool) -> Iterator[bytes]:
    if whole:
        while block := stream.read(BLOCK_BYTES):
            yield block
        return
    for number in range(NUM_BLOCKS):
        stream.seek(number * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
        yield stream.read(BLOCK_BYTES)


FIELDS = {
    "sample_order": "sample order of version",
    "mock": "--mock-data",
    "seed": "--seed",
    "seq_length": "--seq-length",
    "training_share": "training share of each file (--split, --valid-data-path)",
}


def describe_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return each difference between two results of :func:`data_identity` as a text.

    The list is empty if a run sees the same samples. A file is identified by its name, or, where
    that no longer exists, by its content. Weights are compared as shares: 3 and 7 are 0.3 and 0.7.
    """
    changes = [
        f"{name} {_shown(saved.get(key))} -> {_shown(now.get(key))}"
        for key, name in FIELDS.items()
        if saved.get(key) != now.get(key)
    ]
    before, after = saved["files"], now["files"]
    position_before = _matches(before, after)
    changes += [
        f"{file['name']} was removed"
        for position, file in enumerate(before)
        if position not in position_before.values()
    ]
    changes += [
        f"{file['name']} was added"
        for position, file in enumerate(after)
        if position not in position_before
    ]
    both = [(before[old], after[new]) for new, old in sorted(position_before.items())]
    for old, new in both:
        changes += [
            text
            for ending in ("idx", "bin")
            for text in _content(f"{new['name']}.{ending}", old[ending], new[ending])
        ]
    shares_before, shares_after = _shares(before), _shares(after)
    if any(shares_before[old] != shares_after[new] for new, old in position_before.items()):
        changes += [
            f"weight of {new['name']} {_shown(old['weight'])} -> {_shown(new['weight'])}"
            for old, new in both
            if old["weight"] != new["weight"]
        ]
    order = [position_before[new] for new in sorted(position_before)]
    if order != sorted(order):
        changes.append(
            f"order of files {', '.join(before[old]['name'] for old in sorted(order))} -> "
            f"{', '.join(new['name'] for _, new in both)}"
        )
    return changes


def _matches(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[int, int]:
    """Return {position now: position before} of the files in both lists.

    Files match by name and content, else by name, else by content.
    """
    positions: dict[int, int] = {}
    for keys in (("name", "idx", "bin"), ("name",), ("idx", "bin")):
        for new, file in enumerate(after):
            free = (
                old
                for old, other in enumerate(before)
                if old not in positions.values() and all(file[key] == other[key] for key in keys)
            )
            if new not in positions and (old := next(free, None)) is not None:
                positions[new] = old
    return positions


def _shares(files: list[dict[str, Any]]) -> list[Fraction | None]:
    weights = [file["weight"] for file in files]
    if None in weights or not weights:
        return [None] * len(files)
    parts = whole_parts(weights)
    return [Fraction(part, sum(parts)) for part in parts]


def _content(name: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    if old == new:
        return []
    size = f"{old['bytes']} -> {new['bytes']} bytes, " if old["bytes"] != new["bytes"] else ""
    return [
        f"{name}: content differs ({size}fingerprint {old['sha256'][:SHOWN_DIGITS]}.. -> "
        f"{new['sha256'][:SHOWN_DIGITS]}..)"
    ]


def _shown(value: Any) -> str:
    return (
        "none"
        if value is None
        else f"{value:g}"
        if isinstance(value, float)
        else str(value).lower()
    )
