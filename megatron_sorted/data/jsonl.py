"""JSON lines, plain or gzipped, in blocks of whole lines that can be handed to worker processes."""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sorted.errors import DataError

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Block:
    """Whole lines of one file; ``first_line`` counts from 1."""

    path: str
    first_line: int
    data: bytes


def total_bytes(paths: Sequence[str]) -> int:
    """Returns the size of the files as they lie on disk.

    Raises:
        DataError: when one is missing.
    """
    try:
        return sum(os.stat(path).st_size for path in paths)
    except OSError as error:
        raise DataError(f"--input: cannot read {error.filename} ({error.strerror}). Give files that exist.") from error


def read_blocks(paths: Sequence[str], limit: int | None = None, on_bytes: Callable[[int], object] = lambda count: None,
                block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Yields the lines of the files in order, at most ``limit`` of them; ``on_bytes`` is told how many more bytes were read from disk.

    Raises:
        DataError: when a file is missing or a gzip stream is damaged.
    """
    left = limit
    for path in paths:
        line, reported = 1, 0
        try:
            with open(path, "rb") as raw:
                zipped = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                stream = gzip.GzipFile(fileobj=raw) if zipped else raw
                while left is None or left > 0:
                    data = stream.read(block_bytes)
                    if not data:
                        break
                    if not data.endswith(b"\n"):
                        data += stream.readline()
                    count = data.count(b"\n") + (not data.endswith(b"\n"))
                    if left is not None:
                        if count > left:
                            data = b"\n".join(data.split(b"\n", left)[:left])
                        left -= min(count, left)
                    yield Block(path, line, data)
                    line += count
                    on_bytes(raw.tell() - reported)
                    reported = raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip stream after line {line - 1}: {error}. Copy the file again.") from error
        except OSError as error:
            raise DataError(f"--input: cannot read {path} ({error.strerror}). Give files that exist.") from error


def records(block: Block) -> Iterator[tuple[int, Any, str | None]]:
    """Yields (line number, record, None), or (line number, None, reason) for a line that is not JSON; blank lines are passed over."""
    for number, line in enumerate(block.data.split(b"\n"), start=block.first_line):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line), None
        except UnicodeDecodeError:
            yield number, None, "not_utf8"
        except (ValueError, RecursionError):
            yield number, None, "not_json"
