"""Names and texts from outside in a form that is safe to print."""

import os
import re

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MAX_SHOWN = 300


def shown(name: object, most: int = MAX_SHOWN) -> str:
    r"""Return a name in one line that is safe to print.

    Control characters, line breaks of every kind, marks that change the direction of writing and
    bytes that are not text are written as escapes such as ``\x1b``, so that no file can clear the
    screen or write a line of its own. A text longer than ``most`` characters is cut.

    >>> shown("a\nb")
    'a\\nb'
    """
    text = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    text = text if isinstance(text, str) else os.fsdecode(text)
    return one_line(text if len(text) <= most else f"{text[:most]}...")


def one_line(text: str) -> str:
    """Return a message in one line that is safe to print: as ``shown``, but not cut."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def printable(text: str) -> str:
    """Return lines that are safe to print: as ``one_line``, but line feeds and tabs stay."""
    return "".join(
        part if part in "\n\t" else one_line(part) for part in re.split("([\n\t])", text)
    )


def for_terminal(text: str) -> str:
    """Return a text that is safe on a terminal: control characters are written as escapes.

    Line feeds and tabs stay, and marks for the direction of writing and for joined letters, which
    have their meaning in a text.
    """
    return CONTROLS.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)
