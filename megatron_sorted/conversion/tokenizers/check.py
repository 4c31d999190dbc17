"""Comparison of a fast tokenizer with sentencepiece on texts of many kinds."""

import random
import unicodedata
from typing import TYPE_CHECKING

from megatron_sorted.conversion.tokenizers.charsmap import composed_characters
from megatron_sorted.conversion.tokenizers.fast_tokenizer import BLANK, user_symbols
from megatron_sorted.conversion.tokenizers.sentencepiece_file import (
    NORMAL,
    UNIGRAM,
    USER_DEFINED,
    SentencePieceFile,
)
from megatron_sorted.text.tokenizer.compare import probes
from megatron_sorted.text.tokenizer.pieces import SentencePieceTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NUM_MIXTURES = 3000
ROUNDING = 1e-5  # sentencepiece adds scores of unigrams in single precision
TEXTS = (
    "",
    " ",
    "a",
    " a",
    "a ",
    "  two  blanks  ",
    "\t",
    "\n",
    "\n\n\n",
    " \n \t ",
    "a\nb",
    "a\r\nb\r\n",
    "a\n\n  b\n\n\n    c\t\td",
    BLANK,
    f"{BLANK}a{BLANK}{BLANK}",
    f" {BLANK} ",
    "0",
    "12 miles",
    "3.14159 1,000,000 2026-11-21 0x7f 1e-05",
    "  leading",
    "trailing   ",
    *("x" + " " * count + "y" for count in range(1, 40)),
    *("\n" * count + "z" for count in range(2, 12)),
    *(" " * count for count in range(2, 20)),
    "\t\t\tx\t \ty",
    "0000000 11111 123123123",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ababababababab",
    "-----====####****",
    "((((()))))",
    "\u2047 <0x41> <0x0A>",
    "ALL CAPS, MiXeD cAsE, camelCaseWords, snake_case",
    "Once upon a time there was a small red cat. \"Yes\", replied Tom's mother; it's 5 o'clock!",
    "def f(x):\n    if x > 0:\n        return [x ** 2 for _ in range(10)]  # why?\n\treturn "
    "{'a': \"b\"}\n",
    '<div class="a">&nbsp;</div> {{ x }} $\\frac{1}{2}$ http://a.b/c?d=e&f=%20 me@b.c #tag @you '
    "~/.x *.py __init__ -- --- ...",
    "Größer, naïve façade, œuvre, ñandú, şöyle, łódź, ÅÄÖ, ÿ",
    "Лифт на восьмой этаж, ёлка, Ґанок",
    "Ελληνικά ώστε ψυχή",
    "שלום עולם",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया क्षत्रिय",
    "বাংলা ভাষা",
    "தமிழ் மொழி",
    "ภาษาไทยไม่มีวรรค",
    "ကမ္ဘာ",
    "ქართული",
    "հայերեն",
    "አማርኛ",
    "ᏣᎳᎩ",
    "漢字かな交じり文。カタカナ、「引用」",
    "简体中文,没有空格。繁體中文",
    "한국어 문장입니다",
    "Tiếng Việt có dấu: ươ ắ ộ",
    "𐍈𐌰𐌲 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎𠜱",
    "\U0001f600\U0001f680 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea "
    "\U0001f44d\U0001f3fd \u2764\ufe0f 1\ufe0f\u20e3",
    "\u00a0\u2003\u3000 blanks\u200b of other\u2028kinds\u0085",
    "\x00\x01\x07\x08\x0b\x0c\x1b[0m\x1f\x7f\x80\x9f\ufeff\ufffd\U0010ffff",
    "e\u0301 a\u0308 o\u0302\u0323 o\u0323\u0302 \u00f4\u0300 a\u0323\u0301 a\u0301\u0323 "
    "\u1e9b\u0323 \u0344 \u2460\u0301",
    "\ufb01n \u00bd \u2460 \u33a1 \u2122 \u2026 \uff21\uff22\uff43\uff11 \u00b2\u2075 "
    "\u2160\u217b \u212b \u2126 \u00b5",
    "\uff76\uff9e\uff8a\uff9f \uff83\uff9e \u30cf\uff9e",
    "\u1100\u1161\u11a8 \uac00\u11a8 \u304b\u3099 \u0cca\u0cd5",
)
"""Texts to compare, beside the pieces of a tokenizer and mixtures of them."""


def check_texts(file: SentencePieceFile) -> list[str]:
    """Return TEXTS, pieces, mixtures of them and, if any are rewritten, all characters."""
    pieces = [
        piece.text.replace(BLANK, " ")
        for piece in file.pieces
        if piece.kind in (NORMAL, USER_DEFINED)
    ]
    symbols, random_numbers = (
        [symbol.replace(BLANK, " ") for symbol in user_symbols(file)],
        random.Random(0),
    )
    texts = [*TEXTS, "\n".join(TEXTS), *pieces]
    texts += [
        "".join(random_numbers.choices(pieces, k=random_numbers.randint(2, 12)))
        for _ in range(NUM_MIXTURES if pieces else 0)
    ]
    texts += [
        text
        for symbol in symbols
        for text in (f"a{symbol}b", f" {symbol} {symbol}{symbol}  x", f"{symbol}\n{symbol}")
    ]
    texts += [
        "".join(random_numbers.choices([*symbols, *pieces[:50], "a", " ", "b "], k=8))
        for _ in range(300 if symbols else 0)
    ]
    if file.charsmap:
        characters = [
            chr(code)
            for code in range(1, 0x110000)
            if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
        ]
        characters += composed_characters().values()
        texts += [
            "a" + "a".join(characters[begin : begin + 64])
            for begin in range(0, len(characters), 64)
        ]
    return texts


def compare_tokenizers(
    file: SentencePieceFile, own: SentencePieceTokenizer, fast: "Tokenizer"
) -> tuple[int, int]:
    """Check that a fast tokenizer encodes and decodes as sentencepiece does.

    With unigram pieces several splits of a text may have the same score, up to the rounding of
    sentencepiece's sums. Which one wins is arbitrary; such ties are counted, not refused.

    Args:
        file: The content of the sentencepiece file.
        own: Our tokenizer: sentencepiece, with names of control and added tokens.
        fast: The fast tokenizer.

    Returns:
        The number of texts compared, and of ties among them.

    Raises:
        ValueError: A text is encoded or decoded differently.
    """
    special = list(own.named_tokens)
    texts = [text for text in check_texts(file) if not any(token in text for token in special)]
    num_plain, ties = len(texts), 0
    texts += [text for text in probes(special) if any(token in text for token in special)]
    wanted, got = (
        own.encode_batch(texts),
        [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)],
    )
    decoded = fast.decode_batch(wanted[:num_plain], skip_special_tokens=False)
    # After special tokens the libraries join texts by rules of their own; these are not compared.
    decoded += [own.decode(ids) for ids in wanted[num_plain:]]
    for text, right, ids, read in zip(texts, wanted, got, decoded, strict=True):
        if ids != right:
            if not (file.algorithm == UNIGRAM and _is_tie(file, own, right, ids)):
                cut, right_cut = (
                    fast.decode_batch([[i] for i in ids[:12]]),
                    [own.token_text(i) for i in right[:12]],
                )
                raise ValueError(f"{text[:60]!r} is split into {cut}, not {right_cut}")
            ties += 1
        if read != own.decode(right):
            raise ValueError(
                f"{text[:60]!r} is decoded to {read[:60]!r}, not {own.decode(right)[:60]!r}"
            )
    return len(texts), ties


def _is_tie(
    file: SentencePieceFile, own: SentencePieceTokenizer, first: list[int], second: list[int]
) -> bool:
    score, other = (sum(file.pieces[i].score for i in ids) for ids in (first, second))
    same_text = own.decode(first) == own.decode(second)
    return same_text and abs(score - other) <= ROUNDING * max(1.0, abs(score))
