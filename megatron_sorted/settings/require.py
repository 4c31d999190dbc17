"""Statements of rules: each holds, or a `SettingsError` names value, rule and remedy."""

import difflib
from collections.abc import Iterable

from megatron_sorted.errors import SettingsError


def require(holds: bool, message: str) -> None:
    """Raise `SettingsError` with ``message`` unless ``holds``.

    The message names value, rule and remedy.
    """
    if not holds:
        raise SettingsError(message)


def require_divides(value: int, name: str, by: int, by_name: str, remedy: str) -> None:
    """Check that ``by`` divides ``value``; raise `SettingsError` if not."""
    require(value % by == 0, f"{name}: {value} is not a multiple of {by} ({by_name}). {remedy}")


def nearest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return a sentence with the known word nearest to ``word``, or ``otherwise`` if none is near.

    >>> nearest("--lrr", ["--lr", "--seed"])
    'Did you mean --lr?'
    """
    names = list(known)
    continued = [one for one in names if one.startswith(word)]
    # A lower cutoff advised --no-swiglu for --no-bias-swiglu-fusion, and --no-rope-resonance for
    # --no-rope-fusion: another network.
    near = (
        continued
        if len(continued) == 1
        else difflib.get_close_matches(word, names, n=1, cutoff=0.75)
    )
    return f"Did you mean {near[0]}?" if near else otherwise
