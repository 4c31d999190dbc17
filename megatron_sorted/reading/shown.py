"""Names from outside as they may be printed."""

import os
import re

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MOST_SHOWN = 300


def shown(name: object, most: int = MOST_SHOWN) -> str:
    """Return a name (a path, a tensor's or token's name, a value of a file) in one line, without what a terminal obeys.

    Control characters, line breaks of every kind, marks that turn the direction of writing and bytes that are no text
    are written as escapes such as ``\\x1b``, so that no file can clear the screen or write a line of its own. What is
    longer than ``most`` characters is cut.
    """
    text = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    text = text if isinstance(text, str) else os.fsdecode(text)
    return one_line(text if len(text) <= most else f"{text[:most]}...")


def one_line(text: str) -> str:
    """Return a message in one line, without what a terminal obeys; as ``shown``, but whole."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text
    )


def printable(text: str) -> str:
    """Return lines without what a terminal obeys: as ``one_line``, but line feeds and tabs stay."""
    return "".join(one if one in "\n\t" else one_line(one) for one in re.split("([\n\t])", text))


def for_terminal(text: str) -> str:
    """Return a text as a terminal may show it: control characters as escapes, but line feeds and tabs.

    Marks for the direction of writing and for joined letters stay; in a text they have their meaning.
    """
    return CONTROLS.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)
