"""How a rule is stated: it holds, or the user is told value, rule and remedy."""

import difflib
from collections.abc import Iterable

from megatron_sorted.errors import SettingsError


def require(holds: bool, message: str) -> None:
    """Returns nothing if ``holds``.

    Raises:
        SettingsError: it does not; ``message`` says value, rule and remedy.
    """
    if not holds:
        raise SettingsError(message)


def require_divides(value: int, name: str, by: int, by_name: str, remedy: str) -> None:
    """Returns nothing if ``by`` divides ``value``.

    Raises:
        SettingsError: it does not.
    """
    require(value % by == 0, f"{name}: {value} is not a multiple of {by} ({by_name}). {remedy}")


def nearest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Returns the sentence that names the known word nearest to an unknown one, or ``otherwise`` if none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"Did you mean {found[0]}?" if found else otherwise
