"""What a sentencepiece file says of itself, read without protobuf: pieces with scores and kinds, and how text is normalised."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

UNIGRAM, BPE, CHAR = 1, 2, 4
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class VocabularyPiece:
    """One entry of the vocabulary; its place is its id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceFile:
    """The parts of sentencepiece's ModelProto that decide on ids and texts, by its numbers of fields and with its defaults.

    Attributes:
        pieces: The vocabulary.
        algorithm: UNIGRAM, BPE, CHAR or another.
        byte_fallback: Unknown characters are written as bytes.
        suffix_blank: A word's blank stands behind it.
        unknown_text: What an unknown piece is read as.
        charsmap: Compiled rules of normalisation; empty: none.
        adds_blank: A blank is put before every text.
        removes_blanks: Blanks at either end and repeated ones are dropped.
        escapes_blanks: A blank is written as a sign of its own, U+2581.
        changes_decoded: Texts are rewritten after decoding.
    """

    pieces: tuple[VocabularyPiece, ...]
    algorithm: int
    byte_fallback: bool
    suffix_blank: bool
    unknown_text: str
    charsmap: bytes
    adds_blank: bool
    removes_blanks: bool
    escapes_blanks: bool
    changes_decoded: bool


def read_sentencepiece(data: bytes) -> SentencePieceFile:
    """Return what the bytes of a sentencepiece file say.

    Raises:
        ValueError: They are none, or cut off.
    """
    fields = list(_fields(data))
    pieces = tuple(_piece(content) for number, content in fields if number == 1)
    parts = {number: dict(_fields(content)) for number, content in fields if number in (2, 3, 5)}
    trainer, normalizer, denormalizer = (parts.get(number, {}) for number in (2, 3, 5))
    if not pieces:
        raise ValueError("no pieces")
    return SentencePieceFile(
        pieces,
        trainer.get(3, UNIGRAM),
        bool(trainer.get(35, 0)),
        bool(trainer.get(24, 0)),
        trainer.get(44, " \u2047 ".encode()).decode(),
        normalizer.get(2, b""),
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
        bool(normalizer.get(5, 1)),
        bool(denormalizer.get(2, b"")),
    )


def _piece(content: bytes) -> VocabularyPiece:
    found = dict(_fields(content))
    return VocabularyPiece(
        found.get(1, b"").decode(),
        struct.unpack("<f", found.get(2, bytes(4)))[0],
        found.get(3, NORMAL),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and content of every field of a protobuf message: numbers as int, everything else as its bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, form = key >> 3, key & 7
        if form == 0:
            content, position = _varint(data, position)
        elif form in (1, 2, 5):
            length, position = (
                _varint(data, position) if form == 2 else (8 if form == 1 else 4, position)
            )
            content, position = data[position : position + length], position + length
        else:
            raise ValueError(f"field {number} has form {form}")
        if position > len(data):
            raise ValueError("the file is cut off")
        yield number, content


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data):
            raise ValueError("the file is cut off")
        byte = data[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position
