"""Tuned decoding options, stored beside the model as decoding.json.

The file has a part for the model alone, and one for each other model that may draft for it.
"""

import json
from dataclasses import fields
from pathlib import Path

from megatron_sorted.decoding.strategies import STRATEGIES
from megatron_sorted.errors import DataError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.old_names import rename_keys
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown

TUNED_FILE = "decoding.json"
"""File beside the model with the options that megatron-sorted tune chose."""
LEARNED_FILE = "decoding_bandit.json"
"""File beside the model with what a server learned about the speed of strategies."""
FORMAT = 1


def read_tuned_options(path: Path, key: str | None = None) -> dict:
    """Return the tuned options of the model alone, or with the draft model ``key``; {} without any.

    Raises:
        DataError: The file is damaged.
    """
    whole = _read(path)
    return whole if key is None else whole.get("drafts", {}).get(key, {})


def write_tuned_options(path: Path, tuned: dict, key: str | None = None) -> None:
    """Write the tuned options of the model, alone or with the draft model ``key``; keep the others.

    Raises:
        DataError: The existing file is damaged.
    """
    whole = _read(path)
    drafts = whole.get("drafts", {}) | ({} if key is None else {key: tuned})
    whole = {"format": FORMAT, **(tuned if key is None else whole)}
    if drafts:
        whole["drafts"] = drafts
    write_text_atomically(path, json.dumps(whole, indent=2) + "\n")


def _read(path: Path) -> dict:
    if not path.is_file():
        return {}
    whole = read_json_object(path, "Remove it and tune again.")
    try:
        whole = rename_keys(whole)
        if "drafts" in whole:
            whole["drafts"] = {key: rename_keys(part) for key, part in whole["drafts"].items()}
        if whole.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        drafts = whole.get("drafts", {})
        parts = [*([whole] if "strategies" in whole or not drafts else []), *drafts.values()]
        if not all(
            isinstance(part["strategies"], dict) and part["strategies"].keys() <= STRATEGIES.keys()
            for part in parts
        ):
            raise ValueError("it names unknown strategies")
        for part in parts:
            if part.get("best", "full") not in STRATEGIES:
                raise ValueError(f"its best strategy is {part['best']!r}")
            for name, options in part["strategies"].items():
                if unknown := options.keys() - {field.name for field in fields(STRATEGIES[name])}:
                    raise ValueError(f"{name} has no {min(unknown)}")
        return whole
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{shown(path)}: not written by megatron-sorted tune ({shown(error)}). "
            "Remove it and tune again."
        ) from error
