"""Tuned decoding options, stored beside the model as decoding.json.

The file has a part for the model alone, and one for each other model that may draft for it.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

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
DTYPES = ("float32", "bfloat16", "float16", "int8")
"""Kinds of weights that a file may name."""


def read_tuned_options(path: Path, key: str | None = None) -> dict:
    """Return the tuned options of the model alone, or with the draft model ``key``; {} without any.

    Raises:
        DataError: The file is damaged.
    """
    whole = _read(path)
    return whole if key is None else whole.get("drafts", {}).get(key, {})


def tuned_dtype(path: Path) -> str | None:
    """Return the kind of weights with which the model alone was tuned; None if none is recorded.

    Files of earlier versions name it beside the machine, where it chooses nothing.

    Raises:
        DataError: The file is damaged.
    """
    return _read(path).get("dtype")


def other_weights(tuned: Mapping[str, Any], kind: str, is_native: bool) -> str | None:
    """Return how a model was tuned if it was with other weights than these; else None.

    Args:
        tuned: Options as `read_tuned_options` returns them.
        kind: Name of the kind of weights.
        is_native: Whether the compiled library runs them.
    """
    measured = tuned.get("dtype", tuned.get("machine", {}).get("dtype"))
    if measured is None or (measured, tuned.get("native", False)) == (kind, is_native):
        return None
    return f"{measured} by {'the compiled library' if tuned.get('native', False) else 'torch'}"


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
            if part.get("dtype", DTYPES[0]) not in DTYPES:
                raise ValueError(f"its dtype is {part['dtype']!r}")
            if not isinstance(part.get("native", False), bool):
                raise ValueError(f"its native is {part['native']!r}")
            if not isinstance(part.get("machine", {}), dict):
                raise ValueError("its machine is no object")
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
