"""Sentencepiece's rules of normalisation as steps of the library ``tokenizers``.

Sentencepiece rewrites the longest run of characters that its compiled rules know, left to right. The library's own step for these rules
takes whole signs as a reader sees them and drops accents that the rules do not know together with their letter. So the text is taken
apart first: what the rules of Unicode's forms join is joined (NFC), but only where sentencepiece joins it too, then every character is
rewritten alone.
"""

import functools
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentencepiece import SentencePieceNormalizer

APART = "\ufff0"  # parts signs as a control character does; Unicode has given it to nothing
HALF_WIDTH, VOICED = (
    range(0xFF66, 0xFF9E),
    ((0xFF9E, 0x3099), (0xFF9F, 0x309A)),
)  # kana, and the signs that voice them


def charsmap_steps(charsmap: bytes, own: "SentencePieceNormalizer") -> list[Any]:
    """Return normalizers that rewrite text as sentencepiece's rules do.

    Args:
        charsmap: The compiled rules.
        own: Sentencepiece's normalizer with these rules and nothing else.
    """
    from tokenizers import Regex, normalizers

    each = [
        normalizers.Replace(Regex(r"(?m)(?!\A)(?!\z)"), APART),
        normalizers.Precompiled(charsmap),
        normalizers.Replace(APART, ""),
    ]
    forms = composed_characters()
    joined = [sign for sign, parts in forms.items() if own.normalize(parts) == own.normalize(sign)]
    if 2 * len(joined) < len(forms):
        return each  # rules of someone's own, which leave composed characters alone
    whole_first = [
        normalizers.Replace(parts, whole)
        for sign in joined
        if (whole := unicodedata.normalize("NFC", sign))
        != normalizers.NFC().normalize_str(parts := forms[sign])
    ]  # the library's Unicode may be older
    for sign, (half, full) in ((chr(code), pair) for code in HALF_WIDTH for pair in VOICED):
        whole = unicodedata.normalize("NFKC", sign + chr(full))
        if len(whole) == 1 and own.normalize(sign + chr(half)) == whole:
            wide = unicodedata.normalize("NFKC", sign)
            whole_first.append(
                normalizers.Replace(Regex(f"[{sign}{wide}][{chr(half)}{chr(full)}]"), whole)
            )
    return [
        *whole_first,
        normalizers.Replace(Regex(_apart_pattern(forms, set(forms) - set(joined))), APART),
        normalizers.NFC(),
        *each,
    ]


@functools.cache
def composed_characters() -> dict[str, str]:
    """Return the characters that Unicode puts together of others, with their parts."""
    signs = (
        chr(code)
        for code in range(1, 0x110000)
        if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    )
    return {sign: parts for sign in signs if (parts := unicodedata.normalize("NFD", sign)) != sign}


def _apart_pattern(forms: dict[str, str], unknown: set[str]) -> str:
    """Return what matches between two characters that NFC would join or reorder and sentencepiece would not.

    Its rules know every composed character by all of its parts in their standard order, and no composed character with one part more.
    """
    order = unicodedata.combining
    marks = {chr(code) for code in range(0x300, 0x20000) if order(chr(code))} | {
        mark for parts in forms.values() for mark in parts[1:]
    }
    inner = {mark for parts in forms.values() for mark in parts[1:-1]}
    strategies = [f"(?<={_signs({*forms, *(marks - inner)})})(?={_signs(marks)})", r"(?=\x{344})"]
    for place in sorted({order(mark) for mark in inner} - {0}):
        earlier = {mark for mark in marks if 0 < order(mark) < place}
        if earlier:
            strategies.append(
                f"(?<={_signs(mark for mark in inner if order(mark) == place)})(?={_signs(earlier)})"
            )
    strategies += [
        f"(?<={_signs(forms[sign][0])})(?={_signs(forms[sign][1])})"
        for sign in sorted(unknown)
        if len(forms[sign]) == 2
    ]
    return "|".join(strategies)


def _signs(signs: Iterable[str]) -> str:
    """Return the class of characters of a regular expression."""
    codes, ranges = sorted({ord(sign) for sign in signs}), []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in ranges) + "]"
