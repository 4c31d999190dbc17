"""Settings of one run from a file and flags, and their plain form for JSON and YAML."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.flags import SEE_HELP, field_groups, parse_flags
from megatron_sorted.settings.require import nearest
from megatron_sorted.settings.run import Settings
from megatron_sorted.settings.spellings import MEGATRON_NAMES, Given, in_our_names
from megatron_sorted.settings.values import convert, field_types
from megatron_sorted.settings.yaml_file import entries_of, read_settings_text


def load_settings(
    argv: list[str] | None = None,
    network_of: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
) -> Settings:
    """Return the settings of a run.

    Later sources win: defaults, the network of the model that the run starts from, the file of
    ``--config``, flags. With ``--print-settings`` the run is printed and the process exits with
    status 0; ``--help`` exits likewise.

    Args:
        argv: The command line without the program's name; by default that of this process.
        network_of: A function that returns the settings which the model to start from defines,
            given those of file and flags.

    Raises:
        SettingsError: A name is unknown, a value has the wrong type, or the file cannot be read.
    """
    path, print_settings, from_flags = parse_flags(sys.argv[1:] if argv is None else list(argv))
    from_file = _values_of_file(path) if path is not None else {}
    given = {**from_file, **from_flags}
    settings = Settings(**{**network_of(given), **given})
    if print_settings:
        print(settings_as_yaml(settings), end="")
        raise SystemExit(0)
    return settings


OLD_COMMENT = re.compile(r"^# (world-size|planned-device): (\S+)[ \t\r]*$", re.MULTILINE)
"""How files of 0.8 and before gave these two settings: as lines of the comment at the top."""


def values_in_comment(text: str) -> dict[str, str]:
    """Return {key: value} of the settings in the comment at the top of an old run file."""
    return dict(OLD_COMMENT.findall(re.split(r"^\s*$", text, maxsplit=1, flags=re.MULTILINE)[0]))


def notes_on_file(path: str | Path) -> list[str]:
    """Return a note for every setting that a run file gives in a comment at its top.

    Programs of 0.8 and before read it there.
    """
    text = read_settings_text(str(path))
    keys = {entry.key for entry in entries_of(str(path), text)}
    return [
        (
            f"note: {path}: '# {key}: {value}' is a comment. Write it as a key of the file: "
            f"{key}: {value}"
        )
        for key, value in values_in_comment(text).items()
        if key not in keys
    ]


def _values_of_file(path: str) -> dict[str, Any]:
    values, text = {}, read_settings_text(path)
    for key, value in values_in_comment(text).items():
        name = key.replace("-", "_")
        values[name] = convert(name, value, f"{path}, # {key}", strict=False)
    sources = ((one, f"{path}, line {one.line}, {one.key}") for one in entries_of(path, text))
    return values | _converted(
        Given(_known_name(entry.key, source), entry.value, source) for entry, source in sources
    )


def _converted(given: Iterable[Given]) -> dict[str, Any]:
    """Return {field name: value} of settings that have types already."""
    return {
        one.name: convert(one.name, one.value, one.source, strict=True)
        for one in in_our_names(given)
    }


def _known_name(key: str, source: str) -> str:
    """Return the name of a setting, ours or Megatron-LM's, that is written with dashes or not."""
    name = key.replace("-", "_")
    if name not in field_types() and name not in MEGATRON_NAMES:
        known = [field.replace("_", "-") for field in field_types()]
        raise SettingsError(
            f"{shown(source)}: there is no such setting. "
            f"{nearest(name.replace('_', '-')[:80], known, SEE_HELP)}"
        )
    return name


def settings_as_dict(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain data that JSON can hold, by field name."""
    values = dataclasses.asdict(settings)
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def settings_from_dict(values: Mapping[str, Any], source: str = "settings") -> Settings:
    """Return the settings whose plain form is ``values``; absent names take their default.

    Raises:
        SettingsError: A name is unknown or a value has the wrong type.
    """
    return Settings(
        **_converted(
            Given(_known_name(key, f"{source}, {key}"), value, f"{source}, {key}")
            for key, value in values.items()
        )
    )


def settings_as_yaml(settings: Settings) -> str:
    """Return every setting as a line of YAML, grouped under comments.

    `load_settings` reads the text back to the same run.
    """
    values = settings_as_dict(settings)
    lines = []
    for title, fields in field_groups():
        lines += ["", f"# {title}"]
        # JSON is YAML: text in quotes is never read as a number or a truth value
        lines += [
            f"{field.name.replace('_', '-')}: {json.dumps(values[field.name], ensure_ascii=False)}"
            for field in fields
        ]
    return "\n".join(lines[1:]) + "\n"
