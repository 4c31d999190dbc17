"""JSON of files and messages from outside, at a bounded cost.

Size, number of elements, nesting and length of numbers are checked.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from megatron_sorted.errors import DataError, SortedError
from megatron_sorted.reading.shown import shown

MAX_BYTES = 64 << 20
"""Largest size of a JSON file; tokenizers of 262,144 tokens take 35 MB, other files far less."""
MAX_SETTINGS_BYTES = 32 << 20
"""Largest size of a settings file beside a model.

    Those of tokenizers list tens of thousands of added tokens.
"""
MAX_CONTAINERS, MAX_ELEMENTS = 1 << 20, 1 << 22
"""Largest numbers of lists and objects, and of commas, in one text.

    Parsed they take up to 130 and 60 bytes each.
"""
MAX_DEPTH = 100
MAX_DIGITS = 40
"""Longest integer: enough for any count, identifier or hash that is written as a number."""
REMEDY = "Give an intact file."


def parse_json(
    data: bytes | str,
    where: str,
    remedy: str = REMEDY,
    error: type[SortedError] = DataError,
    unique_names: bool = False,
    constants: bool = True,
) -> Any:
    """Return the value of a JSON text in UTF-8 (a byte order mark is skipped).

    Args:
        data: The text.
        where: The name of the text for messages: a path, or a path and a line.
        remedy: The sentence that ends messages.
        error: The class of errors to raise.
        unique_names: Whether two equal names in an object are an error; Python keeps the last.
        constants: Whether NaN, Infinity and -Infinity are accepted, which Python writes although
            JSON has none.

    Raises:
        SortedError: The text is not JSON, is nested more than ``MAX_DEPTH`` deep, or has a number
            of more than ``MAX_DIGITS`` digits or too many elements; its class is ``error``.
    """

    def refuse(reason: object) -> NoReturn:
        raise error(f"{shown(where)}: {reason}. {remedy}")

    opening, comma = (b"[", b"{"), b","
    if isinstance(data, str):
        opening, comma = ("[", "{"), ","
    if sum(map(data.count, opening)) > MAX_CONTAINERS or data.count(comma) > MAX_ELEMENTS:
        refuse(
            f"it has more than {MAX_CONTAINERS:,} lists and objects, or more than "
            f"{MAX_ELEMENTS:,} elements"
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
        refuse(f"its lists and objects are nested more than {MAX_DEPTH} deep")
    except json.JSONDecodeError as failure:
        refuse(f"not JSON ({failure.msg} at line {failure.lineno}, column {failure.colno})")
    except ValueError as failure:
        refuse(failure)
    if _is_deep(value):
        refuse(f"its lists and objects are nested more than {MAX_DEPTH} deep")
    return value


def read_json(
    path: Path,
    remedy: str = REMEDY,
    error: type[SortedError] = DataError,
    max_bytes: int = MAX_BYTES,
    unique_names: bool = False,
) -> Any:
    """Return the value in a JSON file.

    Raises:
        SortedError: The file cannot be read, has more than ``max_bytes``, or ``parse_json``
            refuses it; its class is ``error``.
    """
    return parse_json(
        read_bounded(path, remedy, error, max_bytes), str(path), remedy, error, unique_names
    )


def read_json_object(
    path: Path,
    remedy: str = REMEDY,
    error: type[SortedError] = DataError,
    max_bytes: int = MAX_BYTES,
    unique_names: bool = False,
) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        SortedError: As for ``read_json``, and if the value is not an object.
    """
    value = read_json(path, remedy, error, max_bytes, unique_names)
    if not isinstance(value, dict):
        raise error(f"{shown(path)}: not a JSON object. {remedy}")
    return value


def read_optional_object(path: Path) -> dict[str, Any]:
    """Return the object in a settings file beside a model; empty if there is no such file.

    Raises:
        DataError: It is not a JSON object of reasonable size and nesting.
    """
    if not path.is_file():
        return {}
    return read_json_object(path, "Give an intact directory.", max_bytes=MAX_SETTINGS_BYTES)


def read_bounded(
    path: Path,
    remedy: str = REMEDY,
    error: type[SortedError] = DataError,
    max_bytes: int = MAX_BYTES,
) -> bytes:
    """Return the content of a file.

    Raises:
        SortedError: It cannot be read, or has more than ``max_bytes``; its class is ``error``.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as failure:
        raise error(
            f"{shown(path)}: cannot be read ({failure.strerror or failure}). {remedy}"
        ) from failure
    if len(data) > max_bytes:
        raise error(
            f"{shown(path)}: more than {max_bytes:,} bytes, the limit for such a file. {remedy}"
        )
    return data


class BrokenJsonError(ValueError):
    """The error of a line that is not JSON, or exceeds a bound.

    Its only argument is the reason, a short name for counting.
    """

    @property
    def reason(self) -> str:
        """Return the reason.

        It is "not_json", "not_utf8", "nested_too_deep", "number_too_long" or "too_many_elements".
        """
        return self.args[0]


def decode_json(line: bytes) -> Any:
    """Return the value of a line of JSON: as ``parse_json``, at less cost, for many lines.

    Raises:
        BrokenJsonError: It is not JSON, or exceeds a bound.
    """
    containers = line.count(b"{") + line.count(b"[")
    if len(line) > MAX_CONTAINERS and (
        containers > MAX_CONTAINERS or line.count(b",") > MAX_ELEMENTS
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
    if containers > MAX_DEPTH and _is_deep(value):
        raise BrokenJsonError("nested_too_deep")
    return value


def bounded_integer(text: str, base: int = 10) -> int:
    """Return the whole number that a text stands for.

    Raises:
        ValueError: It has more than ``MAX_DIGITS`` digits.
    """
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits, more than {MAX_DIGITS}")
    return int(text, base)


DECODER = json.JSONDecoder(parse_int=bounded_integer)
"""Decoder of one value; its callers bound bytes and nesting."""


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        duplicate = next(
            name for name, count in Counter(name for name, _ in pairs).items() if count > 1
        )
        raise ValueError(f"{shown(duplicate)} occurs twice")
    return values


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for container in level
            for child in _children(container)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
