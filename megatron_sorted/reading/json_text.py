"""JSON of files and messages from outside, at a bounded cost: size, elements, nesting and length of numbers are checked."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from megatron_sorted.errors import DataError, SortedError
from megatron_sorted.reading.shown import shown

MOST_BYTES = 64 << 20
"""Of a JSON file: tokenizers of 262,144 tokens take 35 MB, other files far less."""
MOST_SETTINGS_BYTES = 32 << 20
"""Of settings beside a model; those of tokenizers list tens of thousands of added tokens."""
MOST_CONTAINERS, MOST_ELEMENTS = 1 << 20, 1 << 22
"""Lists and objects, and commas, of one text. Parsed they take up to 130 and 60 bytes each."""
MOST_DEPTH = 100
MOST_DIGITS = 40
"""Of an integer: enough for any count, identifier or hash that is written as a number."""
REMEDY = "Give an intact file."


def parse_json(
    data: bytes | str,
    where: str,
    remedy: str = REMEDY,
    error: type[SortedError] = DataError,
    unique_names: bool = False,
    constants: bool = True,
) -> Any:
    """Return the value of a JSON text in UTF-8 (a byte order mark is passed over).

    Args:
        data: The text.
        where: What it is, for messages: a path, or a path and a line.
        remedy: The sentence that ends messages.
        error: What to raise.
        unique_names: Whether two equal names in an object are an error. Python keeps the last.
        constants: Whether NaN, Infinity and -Infinity are read, which Python writes and JSON does not know.

    Raises:
        SortedError: Of class ``error``: it is not JSON, nested more than ``MOST_DEPTH`` deep, or has a number of more
            than ``MOST_DIGITS`` digits or more elements than is reasonable.
    """

    def refuse(reason: object) -> NoReturn:
        raise error(f"{shown(where)}: {reason}. {remedy}")

    opening, comma = (b"[", b"{"), b","
    if isinstance(data, str):
        opening, comma = ("[", "{"), ","
    if sum(map(data.count, opening)) > MOST_CONTAINERS or data.count(comma) > MOST_ELEMENTS:
        refuse(
            f"it has more than {MOST_CONTAINERS:,} lists and objects, or more than {MOST_ELEMENTS:,} elements"
        )
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
        value = json.loads(
            text,
            parse_int=bounded_integer,
            object_pairs_hook=_unique if unique_names else None,
            parse_constant=None if constants else _refuse_constant,
        )
    except UnicodeDecodeError as failure:
        refuse(f"byte {failure.start} is not UTF-8")
    except RecursionError:
        refuse(f"its lists and objects are nested more than {MOST_DEPTH} deep")
    except json.JSONDecodeError as failure:
        refuse(f"not JSON ({failure.msg} at line {failure.lineno}, column {failure.colno})")
    except ValueError as failure:
        refuse(failure)
    if _is_deep(value):
        refuse(f"its lists and objects are nested more than {MOST_DEPTH} deep")
    return value


def read_json(
    path: Path,
    remedy: str = REMEDY,
    error: type[SortedError] = DataError,
    most_bytes: int = MOST_BYTES,
    unique_names: bool = False,
) -> Any:
    """Return the value in a JSON file.

    Raises:
        SortedError: Of class ``error``: the file cannot be read, has more than ``most_bytes``, or ``parse_json`` refuses it.
    """
    return parse_json(
        read_bounded(path, remedy, error, most_bytes), str(path), remedy, error, unique_names
    )


def read_json_object(
    path: Path,
    remedy: str = REMEDY,
    error: type[SortedError] = DataError,
    most_bytes: int = MOST_BYTES,
    unique_names: bool = False,
) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        SortedError: As for ``read_json``, and where the value is not an object.
    """
    value = read_json(path, remedy, error, most_bytes, unique_names)
    if not isinstance(value, dict):
        raise error(f"{shown(path)}: not a JSON object. {remedy}")
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """Return the object in a file of settings beside a model; empty where there is no such file.

    Raises:
        DataError: It is no JSON object of reasonable size and nesting.
    """
    if not path.is_file():
        return {}
    return read_json_object(path, "Give an intact directory.", most_bytes=MOST_SETTINGS_BYTES)


def read_bounded(
    path: Path,
    remedy: str = REMEDY,
    error: type[SortedError] = DataError,
    most_bytes: int = MOST_BYTES,
) -> bytes:
    """Return the content of a file.

    Raises:
        SortedError: Of class ``error``: it cannot be read, or has more than ``most_bytes``.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(most_bytes + 1)
    except OSError as failure:
        raise error(
            f"{shown(path)}: cannot be read ({failure.strerror or failure}). {remedy}"
        ) from failure
    if len(data) > most_bytes:
        raise error(
            f"{shown(path)}: more than {most_bytes:,} bytes, the most that is read of such a file. {remedy}"
        )
    return data


class BrokenJsonError(ValueError):
    """A line that is no JSON, or more of it than is reasonable; its only argument is the reason, a short name for counting."""

    @property
    def reason(self) -> str:
        """Return "not_json", "not_utf8", "nested_too_deep", "number_too_long" or "too_many_elements"."""
        return self.args[0]


def decode_json(line: bytes) -> Any:
    """Return the value of a line of JSON: as ``parse_json``, at less cost, for many lines.

    Raises:
        BrokenJsonError: It is none, or more than is reasonable.
    """
    containers = line.count(b"{") + line.count(b"[")
    if len(line) > MOST_CONTAINERS and (
        containers > MOST_CONTAINERS or line.count(b",") > MOST_ELEMENTS
    ):
        raise BrokenJsonError("too_many_elements")
    try:
        value = DECODER.decode(line.decode())
    except UnicodeDecodeError:
        raise BrokenJsonError("not_utf8") from None
    except json.JSONDecodeError:
        raise BrokenJsonError("not_json") from None
    except RecursionError:
        raise BrokenJsonError("nested_too_deep") from None
    except ValueError:
        raise BrokenJsonError("number_too_long") from None
    if containers > MOST_DEPTH and _is_deep(value):
        raise BrokenJsonError("nested_too_deep")
    return value


def bounded_integer(word: str, base: int = 10) -> int:
    """Return the whole number that a word means.

    Raises:
        ValueError: It has more than ``MOST_DIGITS`` digits.
    """
    if len(word) > MOST_DIGITS:
        raise ValueError(f"a number of {len(word):,} digits, more than {MOST_DIGITS}")
    return int(word, base)


DECODER = json.JSONDecoder(parse_int=bounded_integer)
"""Reads one value; whoever calls it bounds bytes and nesting."""


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(
            name for name, times in Counter(name for name, _ in pairs).items() if times > 1
        )
        raise ValueError(f"{shown(twice)} stands twice")
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            child for one in level for child in _children(one) if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
