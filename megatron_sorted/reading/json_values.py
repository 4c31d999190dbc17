"""Reader of JSON values over several lines, one by one: a list of objects, or one after another."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import DECODER, MAX_BYTES, MAX_DEPTH

READ_BYTES = 1 << 20
MAX_RECORD_BYTES = MAX_BYTES
BLANKS = re.compile(r"[ \t\r\n]*")
LIST = re.compile(rb"[ \t\r\n]*\[[ \t\r\n]*\{")


def begins_list(beginning: bytes) -> bool:
    """Return whether a file begins like a list of objects."""
    return LIST.match(beginning) is not None


def begins_over_lines(beginning: bytes) -> bool:
    """Return whether a file begins with an object over several lines.

    Its first line is then not a value by itself; the lines after a damaged line of JSON lines do
    not complete it.
    """
    beginning = beginning.lstrip(b" \t\r\n")
    first = beginning.partition(b"\n")[0]
    if not beginning.startswith(b"{") or len(first) == len(beginning):
        return False
    text = beginning.decode("utf-8", errors="replace")
    try:
        _, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return first.strip() == b"{"  # longer than the beginning, or damaged
    return "\n" in text[:end]


def json_values(stream: BinaryIO, beginning: bytes, in_list: bool, where: str) -> Iterator[bytes]:
    """Yield the JSON of every value, in one line.

    Args:
        stream: The file, after its beginning.
        beginning: What was read of it already.
        in_list: Whether the values are the elements of a list; otherwise they follow one another.
        where: The file, for messages.

    Raises:
        DataError: It is no such list, or a value has more than ``MAX_RECORD_BYTES``.
    """
    yield from _Values(stream, beginning, where).read(in_list)


class _Values:
    """The text of a file in a window that moves forward.

    Attributes:
        text: The window.
        position: The position in it at which the next value is searched.
        line: The line, from 1, on which the window begins.
    """

    def __init__(self, stream: BinaryIO, beginning: bytes, where: str):
        self.stream, self.where = stream, where
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.position, self.line, self.ended, self.count = "", 0, 1, False, 0
        self._take(beginning)

    def _take(self, data: bytes) -> None:
        self.ended = not data
        self.line += self.text.count("\n", 0, self.position)
        try:
            self.text, self.position = (
                self.text[self.position :] + self.decoder.decode(data, final=not data),
                0,
            )
        except UnicodeDecodeError:
            self._refuse("not UTF-8", len(self.text))

    def _refuse(self, reason: str, position: int) -> NoReturn:
        line = self.line + self.text.count("\n", 0, position)
        raise DataError(
            f"{self.where}, line {line}, record {self.count + 1}: {reason}. Correct the file, or "
            "write one record per line."
        )

    def _next_character(self) -> str:
        """Return the next character that is not blank; empty at the end."""
        while True:
            self.position = BLANKS.match(self.text, self.position).end()
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self._take(self.stream.read(READ_BYTES))

    def _value(self) -> str:
        """Return the text of the value at ``position``, and move behind it."""
        read_bytes = READ_BYTES
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.position)
                if end < len(self.text) or self.ended:  # a number might continue
                    value, self.position = self.text[self.position : end], end
                    return value
            except json.JSONDecodeError as error:
                if self.ended:
                    self._refuse(f"not JSON ({error.msg})", error.pos)
            except RecursionError:
                self._refuse(f"nested more than {MAX_DEPTH} deep", self.position)
            except ValueError as error:
                self._refuse(str(error), self.position)
            if len(self.text) - self.position > MAX_RECORD_BYTES:
                self._refuse(f"no value ends within {MAX_RECORD_BYTES:,} bytes", self.position)
            self._take(self.stream.read(read_bytes))
            read_bytes *= 2  # a long value is parsed again each time, so read twice as much

    def read(self, in_list: bool) -> Iterator[bytes]:
        if in_list:
            self._next_character()
            self.position += 1
        while character := self._next_character():
            if in_list and character == "]" and not self.count:
                break
            value = self._value().replace("\r", " ").replace("\n", " ")
            yield value.encode("utf-8")
            self.count += 1
            if in_list and (character := self._next_character()) != ",":
                if character != "]":
                    self._refuse(
                        "neither a comma nor the end of the list follows"
                        if character
                        else "the list has no end",
                        self.position,
                    )
                break
            self.position += in_list
        if in_list:
            self.position += 1
            if self._next_character():
                self._refuse("something follows the list", self.position)
