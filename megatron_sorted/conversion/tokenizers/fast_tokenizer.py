"""Conversion of a sentencepiece file into a tokenizer of the library ``tokenizers``."""

from typing import TYPE_CHECKING, Any

from megatron_sorted.conversion.tokenizers.charsmap import charsmap_steps
from megatron_sorted.conversion.tokenizers.sentencepiece_file import (
    BPE,
    CHAR,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceFile,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLANK = "\u2581"  # the character that sentencepiece writes for a blank
INSIDE = "\ufdd0"  # a character that Unicode reserves for internal use


def rebuild(file: SentencePieceFile, data: bytes, space_before: str = "always") -> "Tokenizer":
    """Build a fast tokenizer with the vocabulary and rules of a sentencepiece file.

    Special tokens are left to the caller.

    Args:
        file: The parsed file.
        data: The bytes of the file.
        space_before: Where a blank is added, if the file asks for one: "always" adds it after named
            tokens too, "first" only at the beginning.

    Raises:
        ValueError: The library cannot express the file's rules.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    if file.algorithm not in (BPE, UNIGRAM, CHAR):
        raise ValueError("its algorithm is neither BPE nor unigram nor single characters")
    if (
        file.suffix_blank
        or not file.escapes_blanks
        or file.changes_decoded
        or any(piece.kind == UNUSED for piece in file.pieces)
    ):
        raise ValueError(
            "it writes blanks behind words or as they are, rewrites what it decodes, or has unused "
            "pieces"
        )
    unknown = next((i for i, piece in enumerate(file.pieces) if piece.kind == UNKNOWN), None)
    if unknown is None or len({piece.text for piece in file.pieces}) < len(file.pieces):
        raise ValueError("it has no unknown piece, or one piece twice")
    fast = Tokenizer(_model(file, unknown))
    is_first = file.adds_blank and space_before == "first"
    fast.normalizer = _normalizer(file, data, file.adds_blank and not is_first)
    # Unlike sentencepiece, Metaspace adds no blank to a text that begins with its replacement
    # character. So the first step uses a blank, with which no text begins here; the second turns
    # it into U+2581, and adds none after tokens.
    steps = (
        [
            pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(BLANK, prepend_scheme="never", split=False),
        ]
        if is_first
        else []
    )
    if file.algorithm != UNIGRAM and (symbols := user_symbols(file)):
        steps.append(pre_tokenizers.Split(Regex("|".join(map(_literal, symbols))), "isolated"))
    if steps:
        fast.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    fast.decoder = _decoder(file, file.pieces[unknown].text)
    return fast


def user_symbols(file: SentencePieceFile) -> list[str]:
    """Return the user-defined symbols, longest first, as sentencepiece looks for them."""
    return sorted(
        (piece.text for piece in file.pieces if piece.kind == USER_DEFINED), key=len, reverse=True
    )


def derive_merges(file: SentencePieceFile) -> list[tuple[str, str]]:
    """Return the pairs of pieces that join to a third, best score first.

    Unlike other BPE tokenizers, sentencepiece joins any two pieces whose text is in its vocabulary.
    """
    known = {piece.text: i for i, piece in enumerate(file.pieces) if piece.kind == NORMAL}
    merges = []
    for text, number in known.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in known and right in known:
                merges.append((-file.pieces[number].score, number, -cut, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _model(file: SentencePieceFile, unknown: int) -> Any:
    """Build the library's model: vocabulary with merges or scores."""
    from tokenizers import models

    if file.algorithm != UNIGRAM:
        # User-defined symbols have no merges: they are split off first and looked up whole.
        return models.BPE(
            {piece.text: i for i, piece in enumerate(file.pieces)},
            derive_merges(file) if file.algorithm == BPE else [],
            unk_token=file.pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=file.byte_fallback,
            ignore_merges=bool(user_symbols(file)),
        )
    normal = [piece.score for piece in file.pieces if piece.kind == NORMAL] or [0.0]
    scores = []
    for piece in file.pieces:
        if piece.kind == NORMAL:
            scores.append(piece.score)
        elif piece.kind == USER_DEFINED:
            # sentencepiece's own formula; its maximum starts at 0.
            scores.append(len(piece.text.encode()) * max(0.0, *normal) - 0.1)
        else:
            # The library would find names of bytes and control pieces in texts; with this score
            # every other split is better.
            scores.append(100 * min(normal) - 100)
    return models.Unigram(
        [(piece.text, score) for piece, score in zip(file.pieces, scores, strict=True)],
        unknown,
        file.byte_fallback,
    )


def _normalizer(file: SentencePieceFile, data: bytes, adds_blank: bool) -> Any:
    """Build the steps that rewrite a text before it is split."""
    from sentencepiece import SentencePieceNormalizer
    from tokenizers import Regex, normalizers

    steps = []
    if file.charsmap:
        own = SentencePieceNormalizer(
            model_proto=data,
            add_dummy_prefix=False,
            escape_whitespaces=False,
            remove_extra_whitespaces=False,
        )
        steps = charsmap_steps(file.charsmap, own)
    if file.removes_blanks:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(BLANK)] if adds_blank else []
    steps.append(normalizers.Replace(" ", BLANK))
    if file.removes_blanks:
        steps.append(normalizers.Replace(Regex(BLANK + r"+\z"), ""))
    return normalizers.Sequence(steps)


def _decoder(file: SentencePieceFile, unknown_piece: str) -> Any:
    """Build the steps that join tokens into a text."""
    from tokenizers import Regex, decoders

    steps = [
        decoders.Replace(Regex(rf"\A{_literal(unknown_piece)}\z"), INSIDE),
        decoders.Replace(BLANK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if file.adds_blank or file.removes_blanks:
        steps.append(decoders.Strip(" ", 1 << 20 if file.removes_blanks else 1, 0))
    return decoders.Sequence([*steps, decoders.Replace(INSIDE, file.unknown_text)])


def _literal(text: str) -> str:
    """Return a regular expression that matches a text literally."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)
