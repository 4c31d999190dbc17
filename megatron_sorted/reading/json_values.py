"""JSON values over several lines: a list of objects, or objects one after another, read one by one."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import DECODER, MOST_BYTES, MOST_DEPTH

READ_BYTES = 1 << 20
MOST_RECORD_BYTES = MOST_BYTES
BLANKS = re.compile(r"[ \t\r\n]*")
LIST = re.compile(rb"[ \t\r\n]*\[[ \t\r\n]*\{")


def begins_list(beginning: bytes) -> bool:
    """Return whether a file begins as a list of objects does."""
    return LIST.match(beginning) is not None


def begins_over_lines(beginning: bytes) -> bool:
    """Return whether a file begins with an object over several lines.

    Its first line is then no value by itself; of a damaged line of JSON lines, what follows does not complete it.
    """
    beginning = beginning.lstrip(b" \t\r\n")
    first = beginning.partition(b"\n")[0]
    if not beginning.startswith(b"{") or len(first) == len(beginning):
        return False
    text = beginning.decode("utf-8", errors="replace")
    try:
        _, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return first.strip() == b"{"  # longer than what was looked at, or damaged within
    return "\n" in text[:end]


def json_values(stream: BinaryIO, beginning: bytes, in_list: bool, where: str) -> Iterator[bytes]:
    """Yield the JSON of every value, in one line.

    Args:
        stream: The file, behind its beginning.
        beginning: What was read of it already.
        in_list: Whether the values are a list's; otherwise they stand one after another.
        where: The file, for messages.

    Raises:
        DataError: It is no such list, or a value has more than ``MOST_RECORD_BYTES``.
    """
    yield from _Values(stream, beginning, where).read(in_list)


class _Values:
    """The text of a file in a window that moves on.

    Attributes:
        text: The window.
        place: Where in it the next value is looked for.
        line: The line, from 1, on which the window begins.
    """

    def __init__(self, stream: BinaryIO, beginning: bytes, where: str):
        self.stream, self.where = stream, where
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.place, self.line, self.ended, self.count = "", 0, 1, False, 0
        self._take(beginning)

    def _take(self, data: bytes) -> None:
        self.ended = not data
        self.line += self.text.count("\n", 0, self.place)
        try:
            self.text, self.place = (
                self.text[self.place :] + self.decoder.decode(data, final=not data),
                0,
            )
        except UnicodeDecodeError:
            self._refuse("not UTF-8", len(self.text))

    def _refuse(self, reason: str, place: int) -> NoReturn:
        line = self.line + self.text.count("\n", 0, place)
        raise DataError(
            f"{self.where}, line {line}, record {self.count + 1}: {reason}. Mend the file, or write one record a line."
        )

    def _next_letter(self) -> str:
        """Return the next character that is no blank; empty at the end."""
        while True:
            self.place = BLANKS.match(self.text, self.place).end()
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self._take(self.stream.read(READ_BYTES))

    def _value(self) -> str:
        """Return the text of the value at ``place``, and go on behind it."""
        wanted = READ_BYTES
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.place)
                if end < len(self.text) or self.ended:  # a number might go on
                    found, self.place = self.text[self.place : end], end
                    return found
            except json.JSONDecodeError as error:
                if self.ended:
                    self._refuse(f"not JSON ({error.msg})", error.pos)
            except RecursionError:
                self._refuse(f"nested more than {MOST_DEPTH} deep", self.place)
            except ValueError as error:
                self._refuse(str(error), self.place)
            if len(self.text) - self.place > MOST_RECORD_BYTES:
                self._refuse(f"no value ends within {MOST_RECORD_BYTES:,} bytes", self.place)
            self._take(self.stream.read(wanted))
            wanted *= (
                2  # a long value is parsed again and again: each time with as much more as there is
            )

    def read(self, in_list: bool) -> Iterator[bytes]:
        if in_list:
            self._next_letter()
            self.place += 1
        while letter := self._next_letter():
            if in_list and letter == "]" and not self.count:
                break
            value = self._value().replace("\r", " ").replace("\n", " ")
            yield value.encode("utf-8")
            self.count += 1
            if in_list and (letter := self._next_letter()) != ",":
                if letter != "]":
                    self._refuse(
                        "neither a comma nor the list's end follows"
                        if letter
                        else "the list has no end",
                        self.place,
                    )
                break
            self.place += in_list
        if in_list:
            self.place += 1
            if self._next_letter():
                self._refuse("something follows the list", self.place)
