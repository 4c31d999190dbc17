"""Conversion of one value of a flag or a YAML file to the type of its field."""

import math
import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.require import nearest
from megatron_sorted.settings.run import Settings

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@cache
def field_types() -> dict[str, Any]:
    """Return the type of every field of `Settings` by name."""
    return get_type_hints(Settings)


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def is_optional(kind: Any) -> bool:
    """Return whether a field of this type may be None."""
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def is_list(kind: Any) -> bool:
    """Return whether a field of this type takes several values."""
    return get_origin(kind) is tuple


def choices(kind: Any) -> tuple[str, ...]:
    """Return the values that a field of this type is limited to; empty if it is not limited."""
    if is_optional(kind):
        return tuple(one for part in get_args(kind) for one in choices(part))
    return get_args(kind) if get_origin(kind) is Literal else ()


def describe(kind: Any) -> str:
    """Return a field's type as a user reads it.

    >>> describe(int | None)
    'a whole number or none'
    """
    if is_optional(kind):
        return " or ".join(
            [*(describe(part) for part in get_args(kind) if part is not type(None)), "none"]
        )
    if is_list(kind):
        return f"a list, each element {describe(get_args(kind)[0])}"
    if choices(kind):
        return "one of " + ", ".join(choices(kind))
    return TYPE_NAMES[kind]


def convert(name: str, value: Any, source: str, strict: bool) -> Any:
    """Return ``value`` as the type of field ``name``.

    Args:
        name: The field.
        value: The value in the flag or the file.
        source: Where it stands, for the message, such as ``--lr`` or ``run.yaml, line 3, lr``.
        strict: True for values that have a type already (YAML), False for text of a command line.

    Raises:
        SettingsError: The value does not have the field's type, or is not finite.
    """
    kind = field_types()[name]
    if is_optional(kind) and isinstance(value, str) and value.lower() == "none":
        return None
    if is_list(kind) and isinstance(value, list):
        # the weights of a blend are numbers in YAML and text on the command line
        is_text = get_args(kind)[0] is str
        value = tuple(
            str(part) if is_text and type(part) in (int, float) else part for part in value
        )
    try:
        result = _adapter(kind).validate_python(value, strict=strict)
    except ValidationError:
        given = list(value) if isinstance(value, tuple) else value
        hint = nearest(str(given)[:80], choices(kind))
        what = f"{shown(repr(given), 120)} is not a value of this setting"
        if given in Settings.__dataclass_fields__[name].metadata["untested"]:
            what += (
                ": Megatron-LM has it, but its steps, its checkpoints and its treatment of output "
                "matrices on several stages are not tested in this program"
            )
        raise SettingsError(
            f"{shown(source)}: {what}. {hint}{' ' * bool(hint)}Give {describe(kind)}."
        ) from None
    numbers = result if isinstance(result, tuple) else (result,)
    for number in numbers:
        if isinstance(number, float) and not math.isfinite(number):
            raise SettingsError(
                f"{shown(source)}: {number} is not a finite number. Give a finite one."
            )
    return result
