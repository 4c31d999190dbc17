"""Reads the YAML file of a run: one mapping, no key twice, and ``1e-4`` is a number."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_sorted.errors import SettingsError


@dataclass(frozen=True)
class Entry:
    """One key of the file, with the line (from 1) on which it stands."""

    key: str
    value: Any
    line: int


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a float needs neither a dot nor a sign in its exponent (YAML 1.2)."""


# PyYAML follows YAML 1.1, where 1e-4 is text: a learning rate written so would silently become a string.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read_yaml(path: str) -> list[Entry]:
    """Returns the entries of the file's mapping in order; an empty file has none.

    Raises:
        SettingsError: the file is missing, is not YAML, is not one mapping with text keys, or names a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config: {path} cannot be read ({error}). Give a YAML file of settings.") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return _entries(loader, node, path)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: this is not valid YAML ({' '.join(str(error).split())}). Mend the file.") from None
    finally:
        loader.dispose()


def _entries(loader: _Loader, node: yaml.Node | None, path: str) -> list[Entry]:
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise SettingsError(f"{path}: a run is a mapping, this file holds something else. Write one `key: value` a line.")
    entries: list[Entry] = []
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise SettingsError(f"{path}, line {line}: the key {key!r} is not text. Keys are names of settings.")
        name = key.replace("-", "_")
        if name in lines:
            raise SettingsError(f"{path}, line {line}: {key} stands already on line {lines[name]}. Keep one of the two.")
        lines[name] = line
        entries.append(Entry(key, loader.construct_object(value_node, deep=True), line))
    return entries
