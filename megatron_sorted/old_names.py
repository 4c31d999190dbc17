"""Old names of options and keys: one table, and the translation that keeps them working.

Tests take the table as their input: every old name works, prints one line that names the new one,
and is refused beside it.
"""

import sys
from collections.abc import Container, Mapping
from typing import Any

from megatron_sorted.errors import SettingsError

FLAGS = {"--way": "--strategy", "--ways": "--strategies"}
"""Options of commands: old name -> new name."""
KEYS = {"way": "strategy", "ways": "strategies"}
"""Keys of decoding.json, decoding_bandit.json and server requests: old name -> new name."""

_printed: set[str] = set()


def rename_flags(arguments: list[str], known: Container[str]) -> list[str]:
    """Return the arguments with old flags replaced by new ones; print one line for each.

    Args:
        arguments: The command line's arguments.
        known: Flags that the command has; others are not renamed.

    Raises:
        SettingsError: An old flag and its new name are given together.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    renamed = list(arguments)
    given = {argument.partition("=")[0] for argument in arguments[:end]}
    for position, argument in enumerate(arguments[:end]):
        old, equals, value = argument.partition("=")
        new = FLAGS.get(old)
        if new is None or old in known or new not in known:
            continue
        if new in given:
            raise SettingsError(
                f"{old} and {new}: two names of one option are given. Leave out {old}."
            )
        renamed[position] = f"{new}{equals}{value}"
        _print_once(old, new)
    return renamed


def rename_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with old keys replaced by new ones; print one line for each.

    Order and values stay.

    >>> rename_keys({"way": "tree", "depth": 4})
    {'strategy': 'tree', 'depth': 4}

    Raises:
        ValueError: An old key and its new name are given together.
    """
    for old, new in KEYS.items():
        if old in values and new in values:
            raise ValueError(f"{old} and {new}: two names of one value are given. Leave out {old}.")
        if old in values:
            _print_once(f"the key {old!r}", repr(new))
    return {KEYS.get(key, key): value for key, value in values.items()}


def _print_once(old: str, new: str) -> None:
    if old not in _printed:
        _printed.add(old)
        print(f"note: {old} is now called {new}; the old name still works.", file=sys.stderr)
