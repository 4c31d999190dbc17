"""Sentencepiece's normalization rules as steps of the library ``tokenizers``.

Sentencepiece rewrites the longest run of characters that its compiled rules know, left to right.
The library's own step for these rules works on grapheme clusters and drops an accent that the rules
do not know together with its letter. So characters are separated first: NFC joins composed
characters, but only those that sentencepiece joins too, then every character is rewritten alone.
"""

import functools
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentencepiece import SentencePieceNormalizer

SEPARATOR = "\ufff0"  # separates characters as control characters do; not assigned by Unicode
HALF_WIDTH_KANA = range(0xFF66, 0xFF9E)
VOICE_MARKS = ((0xFF9E, 0x3099), (0xFF9F, 0x309A))
"""(half-width mark, combining mark) that change the consonant of a kana."""


def charsmap_steps(charsmap: bytes, own: "SentencePieceNormalizer") -> list[Any]:
    """Return normalizers that rewrite text as sentencepiece's rules do.

    Args:
        charsmap: The compiled rules.
        own: Sentencepiece's normalizer with these rules and nothing else.
    """
    from tokenizers import Regex, normalizers

    each = [
        normalizers.Replace(Regex(r"(?m)(?!\A)(?!\z)"), SEPARATOR),
        normalizers.Precompiled(charsmap),
        normalizers.Replace(SEPARATOR, ""),
    ]
    forms = composed_characters()
    joined = [
        character
        for character, parts in forms.items()
        if own.normalize(parts) == own.normalize(character)
    ]
    if 2 * len(joined) < len(forms):
        return each  # these rules leave composed characters alone
    # The library's Unicode tables may be older than Python's.
    whole_first = [
        normalizers.Replace(parts, whole)
        for character in joined
        if (whole := unicodedata.normalize("NFC", character))
        != normalizers.NFC().normalize_str(parts := forms[character])
    ]
    for character, (half, full) in (
        (chr(code), pair) for code in HALF_WIDTH_KANA for pair in VOICE_MARKS
    ):
        whole = unicodedata.normalize("NFKC", character + chr(full))
        if len(whole) == 1 and own.normalize(character + chr(half)) == whole:
            wide = unicodedata.normalize("NFKC", character)
            whole_first.append(
                normalizers.Replace(Regex(f"[{character}{wide}][{chr(half)}{chr(full)}]"), whole)
            )
    return [
        *whole_first,
        normalizers.Replace(Regex(_apart_pattern(forms, set(forms) - set(joined))), SEPARATOR),
        normalizers.NFC(),
        *each,
    ]


@functools.cache
def composed_characters() -> dict[str, str]:
    """Return {composed character: its canonical decomposition}."""
    characters = (
        chr(code)
        for code in range(1, 0x110000)
        if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    )
    return {
        character: parts
        for character in characters
        if (parts := unicodedata.normalize("NFD", character)) != character
    }


def _apart_pattern(forms: dict[str, str], unknown: set[str]) -> str:
    """Return a pattern of places where NFC joins or reorders and sentencepiece does not.

    Its rules know every composed character by all of its parts in their standard order, and no
    composed character with one part more.
    """
    order = unicodedata.combining
    marks = {chr(code) for code in range(0x300, 0x20000) if order(chr(code))} | {
        mark for parts in forms.values() for mark in parts[1:]
    }
    inner = {mark for parts in forms.values() for mark in parts[1:-1]}
    patterns = [f"(?<={_class({*forms, *(marks - inner)})})(?={_class(marks)})", r"(?=\x{344})"]
    for place in sorted({order(mark) for mark in inner} - {0}):
        earlier = {mark for mark in marks if 0 < order(mark) < place}
        if earlier:
            here = _class(mark for mark in inner if order(mark) == place)
            patterns.append(f"(?<={here})(?={_class(earlier)})")
    patterns += [
        f"(?<={_class(forms[character][0])})(?={_class(forms[character][1])})"
        for character in sorted(unknown)
        if len(forms[character]) == 2
    ]
    return "|".join(patterns)


def _class(characters: Iterable[str]) -> str:
    """Return the class of a regular expression that matches these characters."""
    codes, ranges = sorted({ord(character) for character in characters}), []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in ranges) + "]"
