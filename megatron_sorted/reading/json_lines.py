"""Records of JSON files, plain or gzipped, in blocks of whole lines for worker processes.

A file holds one value per line (JSON lines), a list of objects, or objects over several lines, one
after another; the reader recognises which by the content. Memory does not grow with the file.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_sorted.errors import DataError, SortedError
from megatron_sorted.reading.json_text import MAX_BYTES, BrokenJsonError, decode_json
from megatron_sorted.reading.json_values import begins_list, begins_over_lines, json_values
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import open_text

BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = MAX_BYTES
BEGINNING_BYTES = 1 << 16
"""Number of bytes by which the format of a file is recognised."""
NAMES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson", ".ndjson.gz")
"""File extensions of JSON."""
REMEDY = "Give files that exist."


@dataclass(frozen=True)
class Block:
    """Whole lines of one file.

    Attributes:
        path: The path of the file.
        first_line: The number of the first line, from 1; with ``in_records`` that of the first
            record.
        data: The lines.
        in_records: Whether records are counted instead of lines, since a line of the file holds a
            part of one, or several.
    """

    path: str
    first_line: int
    data: bytes
    in_records: bool = False

    @property
    def last_line(self) -> int:
        """Return the number of the last line."""
        return self.first_line + self.data.count(b"\n") - self.data.endswith(b"\n")

    def place(self, number: int, path: object = None) -> str:
        """Return the position of a line or record, for messages."""
        return f"{shown(path or self.path)}{', record ' if self.in_records else ':'}{number}"


def total_bytes(paths: Sequence[str]) -> int:
    """Return the total size of the files on disk.

    Raises:
        DataError: A file is missing, or cannot be read twice.
    """
    total = 0
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(
                f"--input: cannot read {shown(path)} ({error.strerror}). {REMEDY}"
            ) from error
        if not stat.S_ISREG(status.st_mode):
            what = (
                "a folder"
                if stat.S_ISDIR(status.st_mode)
                else "a pipe or device, which cannot be read twice"
            )
            raise DataError(f"--input: {shown(path)} is {what}. Give files.")
        total += status.st_size
    return total


def read_blocks(
    paths: Sequence[str],
    limit: int | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Block]:
    """Yield the lines of the files in order, at most ``limit`` of them.

    ``on_bytes`` is called with the number of bytes that were read from disk since its last call.

    Raises:
        DataError: A file is missing or damaged, or a line or record has more than
            ``MAX_LINE_BYTES``.
    """
    left = limit
    for path in paths:
        reported = 0
        with open_text(path, REMEDY) as (stream, raw):
            for block in _blocks_of(str(path), stream, block_bytes):
                if left is not None:
                    if left <= 0:
                        break
                    lines = block.data.split(b"\n", left)
                    if len(lines) > left:
                        block = Block(
                            block.path, block.first_line, b"\n".join(lines[:left]), block.in_records
                        )
                    left -= min(len(lines) - block.data.endswith(b"\n"), left)
                yield block
                position = raw.tell() if raw.seekable() else reported
                on_bytes(position - reported)
                reported = position


def _blocks_of(path: str, stream: BinaryIO, block_bytes: int) -> Iterator[Block]:
    beginning = stream.read(max(block_bytes, BEGINNING_BYTES))
    in_list = begins_list(beginning)
    if in_list or begins_over_lines(beginning):
        yield from _record_blocks(
            path, json_values(stream, beginning, in_list, shown(path)), block_bytes
        )
        return
    line, data = 1, beginning
    while data:
        if not data.endswith(b"\n"):
            data += stream.readline(MAX_LINE_BYTES)
            if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n") and stream.read(1):
                number = line + data.count(b"\n")
                raise DataError(
                    f"{shown(path)}:{number}: more than {MAX_LINE_BYTES:,} bytes in one line. "
                    "Cut the record into several."
                )
        yield Block(path, line, data)
        line += data.count(b"\n")
        data = stream.read(block_bytes)


def _record_blocks(path: str, values: Iterator[bytes], block_bytes: int) -> Iterator[Block]:
    first, lines, size = 1, [], 0
    for value in values:
        lines.append(value)
        size += len(value) + 1
        if size >= block_bytes:
            yield Block(path, first, b"\n".join(lines) + b"\n", True)
            first, lines, size = first + len(lines), [], 0
    if lines:
        yield Block(path, first, b"\n".join(lines) + b"\n", True)


def records(block: Block) -> Iterator[tuple[int, Any, str | None]]:
    """Yield (line number, value, None), or (line number, None, reason) for a line that is not JSON.

    Blank lines are skipped. Reasons are those of ``BrokenJsonError``.
    """
    for number, line in enumerate(block.data.split(b"\n"), start=block.first_line):
        if not line.strip():
            continue
        try:
            yield number, decode_json(line), None
        except BrokenJsonError as error:
            yield number, None, error.reason


def read_records(
    path: str | Path,
    remedy: str = "Correct or remove the line.",
    limit: int | None = None,
    error: type[SortedError] = DataError,
) -> Iterator[tuple[str, Any]]:
    """Yield (position, value) of every line or record of a file.

    Raises:
        SortedError: A line is not JSON; its class is ``error``.
        DataError: The file cannot be read.
    """
    for block in read_blocks([str(path)], limit):
        for number, value, reason in records(block):
            if reason is not None:
                raise error(f"{block.place(number)}: {reason}. {remedy}")
            yield block.place(number), value


def first_record(path: str | Path) -> Any:
    """Return the first value of a file of JSON lines or records.

    It is None where there is none, or where the file cannot be read twice.
    """
    if not os.path.isfile(path):
        return None
    try:
        return next(
            (value for block in read_blocks([str(path)]) for _, value, _ in records(block)), None
        )
    except DataError:
        return None  # the code that reads the whole file reports the error


def promises_json(path: str | Path) -> bool:
    """Return whether a file's name has an extension of JSON.

    >>> promises_json("chats.jsonl.gz")
    True
    """
    return os.fspath(path).lower().endswith(NAMES)
