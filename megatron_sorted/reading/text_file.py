"""Text of files from outside: UTF-8, plain or gzipped (recognised by content).

A line ends at a line feed and nothing else.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_sorted.errors import DataError, SortedError
from megatron_sorted.reading.shown import shown

MAX_TEXT_BYTES = 1 << 30
"""Largest size of a text that is held in memory as a whole."""
READ_BYTES = 1 << 20
"""Number of bytes read at a time; Python allocates memory for all that is requested."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
REMEDY = "Give a text in UTF-8, plain or gzipped."
OTHER_FORMATS = {
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Unpack it first: zstd -d",
    b"BZh": "compressed with bzip2. Unpack it first: bunzip2",
    b"\xfd7zXZ": "compressed with xz. Unpack it first: unxz",
    b"PK\x03\x04": "a zip archive. Unpack it first: unzip",
    b"PAR1": "a Parquet file. Write it as JSON lines first: datasets' to_json does",
    b"\xff\xfe": "UTF-16, or no text. Save it in UTF-8: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16, or no text. Save it in UTF-8: iconv -f UTF-16 -t UTF-8",
}
"""{first bytes of a file that is no text: its format, and the remedy}."""
MAX_MAGIC = max(map(len, OTHER_FORMATS))


@contextmanager
def open_text(
    path: str | Path, remedy: str = REMEDY, error: type[SortedError] = DataError
) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield (the bytes of a text without compression and byte order mark, the file on disk).

    Both are open for reading. Errors of reading inside the ``with`` block are reported too.

    Raises:
        SortedError: The file cannot be read, is damaged, or is not a text; its class is ``error``.
    """
    try:
        with open(path, "rb") as raw:
            begin = raw.peek(MAX_MAGIC)
            for magic, what in OTHER_FORMATS.items():
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
    max_bytes: int = MAX_TEXT_BYTES,
) -> str:
    r"""Return the text of a file, with ``\n`` at the end of lines.

    Raises:
        SortedError: It cannot be read, is not UTF-8, or has more than ``max_bytes``; its class is
            ``error``.
    """
    with open_text(path, remedy, error) as (stream, _):
        parts, size = [], 0
        while size <= max_bytes and (part := stream.read(READ_BYTES)):
            parts.append(part)
            size += len(part)
    data = b"".join(parts)
    if size > max_bytes:
        raise error(
            f"{shown(path)}: more than {max_bytes:,} bytes, the limit for a text. Give a part of "
            "it."
        )
    return decoded(data, shown(path), remedy, error)


def decoded(
    data: bytes, where: str, remedy: str = REMEDY, error: type[SortedError] = DataError
) -> str:
    r"""Return bytes as text, with ``\n`` at the end of lines.

    Raises:
        SortedError: They are not UTF-8; the message names line and byte. Its class is ``error``.
    """
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        raise error(
            f"{where}, line {line}: not UTF-8 at byte {failure.start}. {remedy}"
        ) from failure


def split_lines(text: str) -> list[str]:
    """Return the lines of a text.

    Only a line feed ends one: U+2028, form feeds and lone carriage returns are content.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def has_surrogates(text: str) -> bool:
    """Return whether a text holds surrogates, which no encoding has.

    They come from bytes that are not UTF-8, or from half of a UTF-16 pair.
    """
    return any("\ud800" <= letter <= "\udfff" for letter in text)
