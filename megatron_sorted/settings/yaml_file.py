"""The reader of the YAML file of a run.

The file is one mapping without duplicate keys; scalars follow the core schema of YAML 1.2.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.json_text import bounded_integer
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import has_surrogates, read_text

MAX_FILE_BYTES = 1 << 18
"""Largest size of a file of settings; those in examples/ have less than 10,000 bytes."""
MAX_VALUES, MAX_DEPTH = 10_000, 20
"""Largest number of values, aliases counted each time, and deepest nesting of lists and mappings.
"""
NO_YAML = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters, and what was a line break in YAML 1.1 but is none in YAML 1.2."""
NULL, TRUE, FALSE = (
    re.compile("null|Null|NULL|~|"),
    re.compile("true|True|TRUE"),
    re.compile("false|False|FALSE"),
)
WHOLE, OCTAL, HEXADECIMAL = (
    re.compile("[-+]?[0-9]+"),
    re.compile("0o[0-7]+"),
    re.compile("0x[0-9a-fA-F]+"),
)
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


@dataclass(frozen=True)
class Entry:
    """One key of the file, with its value and its line (from 1)."""

    key: str
    value: Any
    line: int


def read_yaml(path: str) -> list[Entry]:
    """Return the entries of the mapping in the file; see ``entries_of``."""
    return entries_of(path, read_settings_text(path))


def read_settings_text(path: str) -> str:
    """Return the text of a file of settings, which is read once: it may be a pipe.

    Raises:
        SettingsError: The file is missing, too large, or not text.
    """
    return read_text(path, "Give a YAML file of settings.", SettingsError, MAX_FILE_BYTES)


def entries_of(path: str, text: str) -> list[Entry]:
    """Return the entries of the text's mapping in order; an empty text has none.

    Args:
        path: The file that holds the text, for messages.
        text: The content of the file.

    Raises:
        SettingsError: The text is not YAML, is not one mapping with text keys, or names a key
            twice; it uses tags or merge keys, or its aliases stand for more than ``MAX_VALUES``.
    """
    if match := NO_YAML.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise SettingsError(
            f"{shown(path)}, line {line}: the character {match.group()!r} is not one of YAML. "
            "Remove it."
        )
    return _File(path, text).entries()


def plain_value(text: str) -> Any:
    """Return the value of a scalar without quotes by the core schema of YAML 1.2 (section 10.3.2).

    So ``1e-4`` and ``.5`` are numbers, ``0o17`` is octal and ``017`` is not; ``yes``, ``on``, dates
    and times are texts.

    >>> plain_value("1e-4"), plain_value("yes"), plain_value("null")
    (0.0001, 'yes', None)

    Raises:
        ValueError: A whole number has more digits than any sensible one.
    """
    for pattern, value in ((NULL, None), (TRUE, True), (FALSE, False)):
        if pattern.fullmatch(text):
            return value
    for pattern, base in ((WHOLE, 10), (OCTAL, 8), (HEXADECIMAL, 16)):
        if pattern.fullmatch(text):
            return bounded_integer(text, base)
    if FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


class _File:
    """A parser that builds values from PyYAML's events.

    Nothing but texts, numbers, lists and mappings can result.
    """

    def __init__(self, path: str, text: str):
        self.path, self.anchors, self.num_values = path, {}, 0
        self.loader = yaml.SafeLoader(text)
        self.line = 1

    def refuse(self, what: str, remedy: str) -> NoReturn:
        raise SettingsError(f"{shown(self.path)}, line {self.line}: {what}. {remedy}")

    def entries(self) -> list[Entry]:
        try:
            self.next()  # the stream's start
            event = self.next()
            if isinstance(event, yaml.StreamEndEvent):
                return []
            entries = self.top(self.next())
            self.next()  # the document's end
            if not isinstance(self.next(), yaml.StreamEndEvent):
                self.refuse("a second document begins here", "Keep one of them.")
            return entries
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            problem = " ".join(filter(None, (error.context, error.problem)))
            raise SettingsError(
                f"{shown(self.path)}: this is not valid YAML ({where}{shown(problem)}). Correct "
                "the file."
            ) from None
        # escapes such as "\Uffffffff" raise the last two
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            self.refuse(f"this is not valid YAML ({shown(error)})", "Correct the file.")
        finally:
            self.loader.dispose()

    def next(self) -> yaml.Event:
        event = self.loader.get_event()
        self.line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            self.refuse(
                f"the tag {shown(event.tag, 80).replace('tag:yaml.org,2002:', '!!')} is not "
                "supported",
                "Write the value alone, and a text in quotes.",
            )
        return event

    def top(self, event: yaml.Event) -> list[Entry]:
        if (
            isinstance(event, yaml.ScalarEvent)
            and event.implicit[0]
            and NULL.fullmatch(event.value)
        ):
            return []
        if not isinstance(event, yaml.MappingStartEvent):
            raise SettingsError(
                f"{shown(self.path)}: a run is a mapping, this file holds something else. Write "
                "one `key: value` a line."
            )
        return self.pairs(1, lambda key: key.replace("-", "_"))

    def value(self, event: yaml.Event, depth: int) -> Any:
        """Return the value that begins with an event; an alias counts as what it stands for."""
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                self.refuse(
                    f"the alias *{shown(event.anchor, 80)} stands for nothing that is complete "
                    "here",
                    "Write the value out.",
                )
            value, size = self.anchors[event.anchor]
            self.count(size)
            return value
        before = self.num_values
        self.count(1)
        if depth > MAX_DEPTH:
            self.refuse(
                f"lists and mappings are nested more than {MAX_DEPTH} deep",
                "A setting is a text, a number or a list of these.",
            )
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(inner := self.next(), yaml.SequenceEndEvent):
                value.append(self.value(inner, depth + 1))
        else:
            value = {entry.key: entry.value for entry in self.pairs(depth + 1)}
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, self.num_values - before)
        return value

    def count(self, number: int) -> None:
        self.num_values += number
        if self.num_values > MAX_VALUES:
            self.refuse(
                f"the file stands for more than {MAX_VALUES:,} values, aliases counted each time",
                "Write fewer.",
            )

    def scalar(self, event: yaml.ScalarEvent) -> Any:
        if has_surrogates(event.value):
            self.refuse(
                f"{event.value[:40]!r} holds half of a UTF-16 pair, which is no text",
                "Write the character itself.",
            )
        try:
            return plain_value(event.value) if event.implicit[0] else event.value
        except ValueError as error:
            self.refuse(str(error), "Write it with fewer digits.")

    def pairs(self, depth: int, normalise: Callable[[str], str] = str) -> list[Entry]:
        """Return the entries up to a mapping's end; keys equal after ``normalise`` are an error."""
        entries: list[Entry] = []
        lines: dict[str, int] = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            line = self.line
            key = self.value(event, depth)
            if key == "<<" and isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
                self.refuse("the merge key << is not supported", "Write the settings out.")
            if not isinstance(key, str):
                self.line = line
                self.refuse(
                    f"the key {shown(repr(key), 80)} is not text", "Keys are names of settings."
                )
            if normalise(key) in lines:
                self.refuse(
                    f"{shown(key, 80)} is already on line {lines[normalise(key)]}",
                    "Keep one of the two.",
                )
            lines[normalise(key)] = line
            entries.append(Entry(key, self.value(self.next(), depth + 1), line))
        return entries
