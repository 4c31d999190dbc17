"""Tuned decoding options, stored beside the model as decoding.json.

The file has a part for the model alone, and one for each other model that may draft for it. A part
holds what was measured last, and under ``others`` what was measured with other kinds of weights.
Under ``engines`` it has the draft lengths that were measured inside other engines.
"""

import json
import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

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
MAX_SCHEDULED = 64
"""Largest number of draft tokens that a schedule may name."""
DTYPES = ("float32", "bfloat16", "float16", "int8")
"""Kinds of weights that a file may name."""


class WeightsInUse(NamedTuple):
    """The weights of a network, by which its tuned options are found.

    Attributes:
        kind: Name of the kind of weights.
        is_native: Whether the compiled library runs them.
    """

    kind: str
    is_native: bool

    def __str__(self) -> str:
        """Return how a note names them, which is also their key in a file."""
        return f"{self.kind} by {'the compiled library' if self.is_native else 'torch'}"


def read_tuned_options(
    path: Path, key: str | None = None, weights: WeightsInUse | None = None
) -> dict:
    """Return the tuned options of the model alone, or with the draft model ``key``; {} without any.

    Args:
        path: The file.
        key: Key of the draft model; None without one.
        weights: Weights whose options are preferred to those that were measured last.

    Raises:
        DataError: The file is damaged.
    """
    whole = _read(path)
    part = dict(whole if key is None else whole.get("drafts", {}).get(key, {}))
    others = part.pop("others", {})
    return part if weights == weights_of(part) else others.get(str(weights), part)


def tuned_dtype(path: Path) -> str | None:
    """Return the kind of weights with which the model alone was tuned last; None if none is named.

    Files of earlier versions name it beside the machine, where it chooses nothing.

    Raises:
        DataError: The file is damaged.
    """
    return _read(path).get("dtype")


def read_draft_schedule(path: Path, engine: str, depth: int) -> dict:
    """Return what was measured of drafts by an exit inside another engine; {} if nothing was.

    Raises:
        DataError: The file is damaged.
    """
    return _read(path).get("engines", {}).get(engine, {}).get(str(depth), {})


def scheduled_exit(path: Path, engine: str) -> int | None:
    """Return the exit whose drafts were measured last inside another engine; None if none was.

    Raises:
        DataError: The file is damaged.
    """
    measured = _read(path).get("engines", {}).get(engine, {})
    newest = max(measured, key=lambda depth: measured[depth].get("date", ""), default=None)
    return None if newest is None else int(newest)


def write_draft_schedule(path: Path, engine: str, depth: int, measured: dict) -> None:
    """Write what was measured of drafts by an exit inside another engine; keep all the rest.

    Raises:
        DataError: The existing file is damaged.
    """
    whole = _read(path)
    engines = whole.pop("engines", {})
    engines[engine] = {**engines.get(engine, {}), str(depth): measured}
    whole = {"format": FORMAT, **whole, "engines": engines}
    write_text_atomically(path, json.dumps(whole, indent=2) + "\n")


def weights_of(tuned: Mapping[str, Any]) -> WeightsInUse | None:
    """Return the weights with which options were measured; None if the file does not say."""
    kind = tuned.get("dtype", tuned.get("machine", {}).get("dtype"))
    return None if kind is None else WeightsInUse(kind, tuned.get("native", False))


def write_tuned_options(path: Path, tuned: dict, key: str | None = None) -> None:
    """Write the tuned options of the model, alone or with the draft model ``key``; keep the others.

    Options that were measured with the same weights are replaced.

    Raises:
        DataError: The existing file is damaged.
    """
    whole = _read(path)
    drafts, engines = whole.pop("drafts", {}), whole.pop("engines", {})
    if key is None:
        whole = {"format": FORMAT, **_joined(whole, tuned)}
    else:
        drafts[key] = _joined(drafts.get(key, {}), tuned)
        whole = {"format": FORMAT, **whole}
    if drafts:
        whole["drafts"] = drafts
    if engines:
        whole["engines"] = engines
    write_text_atomically(path, json.dumps(whole, indent=2) + "\n")


def _joined(part: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict:
    """Return a part of a file whose newest options are ``tuned``."""
    others = dict(part.get("others", {}))
    before = {name: value for name, value in part.items() if name not in ("others", "format")}
    if (weights := weights_of(before)) is not None and "strategies" in before:
        others[str(weights)] = before
    others.pop(str(weights_of(tuned)), None)
    return {**tuned, "others": others} if others else dict(tuned)


def _read(path: Path) -> dict:
    if not path.is_file():
        return {}
    whole = read_json_object(path, "Remove it and tune again.")
    try:
        whole = rename_keys(whole)
        if whole.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if "drafts" in whole:
            whole["drafts"] = {key: rename_keys(part) for key, part in whole["drafts"].items()}
        drafts = whole.get("drafts", {})
        engines = whole.get("engines", {})
        for depths in engines.values():
            for depth, measured in depths.items():
                int(depth)
                _check_draft_schedule(measured)
        has_alone = "strategies" in whole or not (drafts or engines)
        parts = [*([whole] if has_alone else []), *drafts.values()]
        for part in parts:
            _check(part)
            for name, other in part.get("others", {}).items():
                _check(other)
                if name != str(weights_of(other)):
                    raise ValueError(f"its options of {name!r} are those of {weights_of(other)}")
        return whole
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{shown(path)}: not written by megatron-sorted tune ({shown(error)}). "
            "Remove it and tune again."
        ) from error


def _check(part: Mapping[str, Any]) -> None:
    """Check the options that were measured with one kind of weights.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: They are damaged.
    """
    if not part["strategies"].keys() <= STRATEGIES.keys():
        raise ValueError("it names unknown strategies")
    if part.get("dtype", DTYPES[0]) not in DTYPES:
        raise ValueError(f"its dtype is {part['dtype']!r}")
    if not isinstance(part.get("native", False), bool):
        raise ValueError(f"its native is {part['native']!r}")
    machine = part.get("machine", {})
    if not isinstance(machine, dict):
        raise ValueError("its machine is no object")
    if machine.get("dtype", DTYPES[0]) not in DTYPES:
        raise ValueError(f"its machine's dtype is {machine['dtype']!r}")
    if type(machine.get("threads", 1)) is not int:
        raise ValueError(f"its machine's threads are {machine['threads']!r}")
    if part.get("best", "full") not in STRATEGIES:
        raise ValueError(f"its best strategy is {part['best']!r}")
    for name, options in part["strategies"].items():
        known = {field.name: field.type for field in fields(STRATEGIES[name])}
        if unknown := options.keys() - known.keys():
            raise ValueError(f"{name} has no {min(unknown)}")
        for option, value in options.items():
            if not _is(value, known[option]):
                raise ValueError(f"{option} of {name} is {value!r}")


def _check_draft_schedule(measured: Mapping[str, Any]) -> None:
    """Check what was measured of an exit's drafts inside another engine.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: It is damaged.
    """
    if not isinstance(measured.get("date", ""), str):
        raise ValueError(f"its date is {measured['date']!r}")
    next_size = 1
    for row in measured["schedule"]:
        if not _is(row, tuple[int, ...]) or len(row) != 3:
            raise ValueError(f"a row of its schedule is {row!r}")
        first, last, length = row
        if first != next_size or last < first or not 0 <= length <= MAX_SCHEDULED:
            raise ValueError(f"a row of its schedule is {row!r}")
        next_size = last + 1
    if next_size == 1:
        raise ValueError("its schedule is empty")


def _is(value: Any, kind: type | types.GenericAlias) -> bool:
    """Return whether a JSON value can be an option of this type."""
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is(one, get_args(kind)[0]) for one in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind
