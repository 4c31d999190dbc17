"""Text of files from outside: plain or gzipped, told by content; UTF-8; a line ends at a line feed and nothing else."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_sorted.errors import DataError, SortedError
from megatron_sorted.reading.shown import shown

MOST_TEXT_BYTES = 1 << 30
"""Of a text that is held in memory as a whole."""
READ_BYTES = 1 << 20
"""At a time: asked for more, Python takes memory for all of it."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
REMEDY = "Give a text in UTF-8, plain or gzipped."
OTHERS = {
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Unpack it first: zstd -d",
    b"BZh": "compressed with bzip2. Unpack it first: bunzip2",
    b"\xfd7zXZ": "compressed with xz. Unpack it first: unxz",
    b"PK\x03\x04": "a zip archive. Unpack it first: unzip",
    b"PAR1": "a Parquet file. Write it as JSON lines first: datasets' to_json does",
    b"\xff\xfe": "UTF-16, or no text. Save it in UTF-8: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16, or no text. Save it in UTF-8: iconv -f UTF-16 -t UTF-8",
}
"""What files begin with that people give for texts -> what they are, and what to do."""
MOST_MAGIC = max(map(len, OTHERS))


@contextmanager
def opened(
    path: str | Path, remedy: str = REMEDY, error: type[SortedError] = DataError
) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield (the bytes of a text without compression and byte order mark, the file as it lies on disk), both open for reading.

    Errors of reading inside the ``with`` block are named too.

    Raises:
        SortedError: Of class ``error``: the file cannot be read, is damaged, or is something else than a text.
    """
    try:
        with open(path, "rb") as raw:
            begin = raw.peek(MOST_MAGIC)
            for magic, what in OTHERS.items():
                if begin.startswith(magic):
                    raise error(f"{shown(path)}: it is {what} {shown(path)}")
            stream: BinaryIO = raw
            if begin.startswith(GZIP):
                stream = gzip.GzipFile(fileobj=raw)
                begin = stream.peek(len(BYTE_ORDER_MARK))
            if begin.startswith(BYTE_ORDER_MARK):
                stream.read(len(BYTE_ORDER_MARK))
            yield stream, raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as failure:
        raise error(
            f"{shown(path)}: damaged gzip stream ({failure}). Copy the file again."
        ) from failure
    except OSError as failure:
        raise error(
            f"{shown(path)}: cannot be read ({failure.strerror or failure}). {remedy}"
        ) from failure


def read_text(
    path: str | Path,
    remedy: str = REMEDY,
    error: type[SortedError] = DataError,
    most_bytes: int = MOST_TEXT_BYTES,
) -> str:
    """Return the text of a file; a carriage return before a line feed is part of the line's end, and left out.

    Raises:
        SortedError: Of class ``error``: it cannot be read, is no UTF-8, or has more than ``most_bytes``.
    """
    with opened(path, remedy, error) as (stream, _):
        parts, size = [], 0
        while size <= most_bytes and (part := stream.read(READ_BYTES)):
            parts.append(part)
            size += len(part)
    data = b"".join(parts)
    if size > most_bytes:
        raise error(
            f"{shown(path)}: more than {most_bytes:,} bytes, the most that is held of a text. Give a part of it."
        )
    return decoded(data, shown(path), remedy, error)


def decoded(
    data: bytes, where: str, remedy: str = REMEDY, error: type[SortedError] = DataError
) -> str:
    """Return bytes as text, with ``\\n`` at the end of lines.

    Raises:
        SortedError: Of class ``error``: they are not UTF-8; names line and byte.
    """
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        raise error(
            f"{where}, line {line}: not UTF-8 at byte {failure.start}. {remedy}"
        ) from failure


def split_lines(text: str) -> list[str]:
    """Return the lines of a text. A line feed ends one, and nothing else: U+2028, form feeds and lone carriage returns are content."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]
