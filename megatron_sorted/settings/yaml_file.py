"""Reads the YAML file of a run: one mapping, no key twice, words and numbers by the core schema of YAML 1.2."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from megatron_sorted.command_line import has_half_pairs
from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.json_text import bounded_integer
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import read_text

MOST_FILE_BYTES = 1 << 18
"""Of a file of settings; those in examples/ have less than 10,000."""
MOST_VALUES, MOST_DEPTH = 10_000, 20
"""Of a file, what aliases stand for counted each time; and how deep lists and mappings may stand in each other."""
NO_YAML = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters, and what was a line break in YAML 1.1 and is none in YAML 1.2."""
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
    """One key of the file, with the line (from 1) on which it stands."""

    key: str
    value: Any
    line: int


def read_yaml(path: str) -> list[Entry]:
    """Return the entries of the mapping in the file; see ``entries_of``."""
    return entries_of(path, read_settings_text(path))


def read_settings_text(path: str) -> str:
    """Return the text of a file of settings, which is read once: it may be a pipe.

    Raises:
        SettingsError: The file is missing, too large, or no text.
    """
    return read_text(path, "Give a YAML file of settings.", SettingsError, MOST_FILE_BYTES)


def entries_of(path: str, text: str) -> list[Entry]:
    """Return the entries of the text's mapping in order; an empty text has none.

    Args:
        path: The file that holds the text, for messages.
        text: What it holds.

    Raises:
        SettingsError: The text is not YAML, is not one mapping with text keys, or names a key twice;
            it uses tags or merge keys, or its aliases stand for more than ``MOST_VALUES``.
    """
    if found := NO_YAML.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise SettingsError(
            f"{shown(path)}, line {line}: the character {found.group()!r} is not one of YAML. Remove it."
        )
    return _File(path, text).entries()


def plain_value(word: str) -> Any:
    """Return what a word without quotes means by the core schema of YAML 1.2 (section 10.3.2).

    So ``1e-4`` and ``.5`` are numbers, ``0o17`` is octal and ``017`` is not; ``yes``, ``on``, dates and times are texts.

    Raises:
        ValueError: A whole number has more digits than any that is meant.
    """
    for pattern, value in ((NULL, None), (TRUE, True), (FALSE, False)):
        if pattern.fullmatch(word):
            return value
    for pattern, base in ((WHOLE, 10), (OCTAL, 8), (HEXADECIMAL, 16)):
        if pattern.fullmatch(word):
            return bounded_integer(word, base)
    if FLOAT.fullmatch(word):
        return float(word.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return word


class _File:
    """Goes through PyYAML's events and builds values of its own, so that nothing but texts, numbers, lists and mappings comes of them."""

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
                f"{shown(self.path)}: this is not valid YAML ({where}{shown(problem)}). Mend the file."
            ) from None
        except (
            yaml.YAMLError,
            ValueError,
            OverflowError,
        ) as error:  # the last two of escapes such as "\Uffffffff"
            self.refuse(f"this is not valid YAML ({shown(error)})", "Mend the file.")
        finally:
            self.loader.dispose()

    def next(self) -> yaml.Event:
        event = self.loader.get_event()
        self.line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            self.refuse(
                f"the tag {shown(event.tag, 80).replace('tag:yaml.org,2002:', '!!')} is not taken",
                "Write the value alone; a text stands in quotes.",
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
                f"{shown(self.path)}: a run is a mapping, this file holds something else. Write one `key: value` a line."
            )
        return self.pairs(1, lambda key: key.replace("-", "_"))

    def value(self, event: yaml.Event, depth: int) -> Any:
        """Return the value that begins with an event; aliases are counted for what they stand for."""
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                self.refuse(
                    f"the alias *{shown(event.anchor, 80)} stands for nothing that is complete here",
                    "Write the value out.",
                )
            value, size = self.anchors[event.anchor]
            self.count(size)
            return value
        before = self.num_values
        self.count(1)
        if depth > MOST_DEPTH:
            self.refuse(
                f"lists and mappings are nested more than {MOST_DEPTH} deep",
                "A setting is a word, a number or a list of these.",
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
        if self.num_values > MOST_VALUES:
            self.refuse(
                f"the file stands for more than {MOST_VALUES:,} values, aliases counted each time",
                "Write fewer.",
            )

    def scalar(self, event: yaml.ScalarEvent) -> Any:
        if has_half_pairs(event.value):
            self.refuse(
                f"{event.value[:40]!r} holds half of a UTF-16 pair, which is no text",
                "Write the character itself.",
            )
        try:
            return plain_value(event.value) if event.implicit[0] else event.value
        except ValueError as error:
            self.refuse(str(error), "Write it with fewer digits.")

    def pairs(self, depth: int, same: Callable[[str], str] = str) -> list[Entry]:
        """Return the entries up to a mapping's end; two keys that are the ``same`` are an error."""
        entries: list[Entry] = []
        lines: dict[str, int] = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            line = self.line
            key = self.value(event, depth)
            if key == "<<" and isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
                self.refuse("the merge key << is not taken", "Write the settings out.")
            if not isinstance(key, str):
                self.line = line
                self.refuse(
                    f"the key {shown(repr(key), 80)} is not text", "Keys are names of settings."
                )
            if same(key) in lines:
                self.refuse(
                    f"{shown(key, 80)} stands already on line {lines[same(key)]}",
                    "Keep one of the two.",
                )
            lines[same(key)] = line
            entries.append(Entry(key, self.value(self.next(), depth + 1), line))
        return entries
