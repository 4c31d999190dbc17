"""What a user may have meant by a word that is not known."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Returns the sentence that names the known word nearest to an unknown one, or ``otherwise`` if none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"Did you mean {found[0]}?" if found else otherwise
