"""A sentencepiece file rebuilt with the library ``tokenizers``."""

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

BLANK = "\u2581"  # sentencepiece writes a blank as this sign
INSIDE = "\ufdd0"  # a sign that Unicode keeps free for a program's own use


def rebuild(
    said: SentencePieceFile, data: bytes, blank_before: str = "always"
) -> "Tokenizer | str":
    """Return a fast tokenizer with the vocabulary and the rules of a sentencepiece file, without special tokens; or why there is none.

    Args:
        said: What the file says.
        data: The file.
        blank_before: Of a file that puts a blank before texts: "always" behind the names of tokens too, or only "first" of all.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    if said.algorithm not in (BPE, UNIGRAM, CHAR):
        return "it is neither of BPE nor of unigram nor of single characters"
    if (
        said.suffix_blank
        or not said.escapes_blanks
        or said.changes_decoded
        or any(piece.kind == UNUSED for piece in said.pieces)
    ):
        return "it writes blanks behind words or as they are, rewrites what it decodes, or has unused pieces"
    unknown = next((i for i, piece in enumerate(said.pieces) if piece.kind == UNKNOWN), None)
    if unknown is None or len({piece.text for piece in said.pieces}) < len(said.pieces):
        return "it has no unknown piece, or one piece twice"
    fast = Tokenizer(_model(said, unknown))
    is_first = said.adds_blank and blank_before == "first"
    fast.normalizer = _normalizer(said, data, said.adds_blank and not is_first)
    # Metaspace puts no blank before a text that begins with its own sign, which sentencepiece does. So the first
    # step's sign is a blank, with which no text begins here; the second makes it U+2581, and puts none behind tokens.
    steps = (
        [
            pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(BLANK, prepend_scheme="never", split=False),
        ]
        if is_first
        else []
    )
    if said.algorithm != UNIGRAM and (symbols := user_symbols(said)):
        steps.append(pre_tokenizers.Split(Regex("|".join(map(_literal, symbols))), "isolated"))
    if steps:
        fast.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    fast.decoder = _decoder(said, said.pieces[unknown].text)
    return fast


def user_symbols(said: SentencePieceFile) -> list[str]:
    """Return the symbols that the user defined, longest first, as sentencepiece looks for them."""
    return sorted(
        (piece.text for piece in said.pieces if piece.kind == USER_DEFINED), key=len, reverse=True
    )


def derive_merges(said: SentencePieceFile) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a third, best score first: sentencepiece joins whatever is in its vocabulary."""
    known = {piece.text: i for i, piece in enumerate(said.pieces) if piece.kind == NORMAL}
    found = []
    for text, number in known.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in known and right in known:
                found.append((-said.pieces[number].score, number, -cut, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _model(said: SentencePieceFile, unknown: int) -> Any:
    from tokenizers import models

    if said.algorithm != UNIGRAM:
        # A symbol of the user's has no merges: it is cut out first and then found whole.
        return models.BPE(
            {piece.text: i for i, piece in enumerate(said.pieces)},
            derive_merges(said) if said.algorithm == BPE else [],
            unk_token=said.pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=said.byte_fallback,
            ignore_merges=bool(user_symbols(said)),
        )
    normal = [piece.score for piece in said.pieces if piece.kind == NORMAL] or [0.0]
    scores = []
    for piece in said.pieces:
        if piece.kind == NORMAL:
            scores.append(piece.score)
        elif piece.kind == USER_DEFINED:
            scores.append(
                len(piece.text.encode()) * max(0.0, *normal) - 0.1
            )  # what sentencepiece takes; its largest starts at 0
        else:  # the library would find the names of bytes and control pieces in a text; no path of pieces is as bad as this
            scores.append(100 * min(normal) - 100)
    return models.Unigram(
        [(piece.text, score) for piece, score in zip(said.pieces, scores, strict=True)],
        unknown,
        said.byte_fallback,
    )


def _normalizer(said: SentencePieceFile, data: bytes, adds_blank: bool) -> Any:
    from sentencepiece import SentencePieceNormalizer
    from tokenizers import Regex, normalizers

    steps = []
    if said.charsmap:
        own = SentencePieceNormalizer(
            model_proto=data,
            add_dummy_prefix=False,
            escape_whitespaces=False,
            remove_extra_whitespaces=False,
        )
        steps = charsmap_steps(said.charsmap, own)
    if said.removes_blanks:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(BLANK)] if adds_blank else []
    steps.append(normalizers.Replace(" ", BLANK))
    if said.removes_blanks:
        steps.append(normalizers.Replace(Regex(BLANK + r"+\z"), ""))
    return normalizers.Sequence(steps)


def _decoder(said: SentencePieceFile, unknown_piece: str) -> Any:
    from tokenizers import Regex, decoders

    steps = [
        decoders.Replace(Regex(rf"\A{_literal(unknown_piece)}\z"), INSIDE),
        decoders.Replace(BLANK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if said.adds_blank or said.removes_blanks:
        steps.append(decoders.Strip(" ", 1 << 20 if said.removes_blanks else 1, 0))
    return decoders.Sequence([*steps, decoders.Replace(INSIDE, said.unknown_text)])


def _literal(text: str) -> str:
    """Return the regular expression of a text."""
    return "".join(f"\\x{{{ord(sign):x}}}" for sign in text)
