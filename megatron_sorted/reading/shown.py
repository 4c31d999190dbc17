"""Names from outside as they may be printed."""

import os

MOST_SHOWN = 300


def shown(name: object, most: int = MOST_SHOWN) -> str:
    """Return a name (a path, a tensor's or token's name, a value of a file) in one line, without what a terminal obeys.

    Control characters, line breaks of every kind, marks that turn the direction of writing and bytes that are no text
    are written as escapes such as ``\\x1b``, so that no file can clear the screen or write a line of its own. What is
    longer than ``most`` characters is cut.
    """
    text = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    text = text if isinstance(text, str) else os.fsdecode(text)
    text = text if len(text) <= most else f"{text[:most]}..."
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)
