"""Reader of sentencepiece files without protobuf: pieces, scores, kinds and normalization."""

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
    """The fields of sentencepiece's ModelProto that determine ids and texts.

    Attributes:
        pieces: The vocabulary.
        algorithm: UNIGRAM, BPE, CHAR or another.
        byte_fallback: Whether unknown characters are encoded as bytes.
        suffix_blank: Whether a blank belongs to the word before it.
        unknown_text: The text to which an unknown piece is decoded.
        charsmap: Compiled normalization rules; empty if there are none.
        adds_blank: Whether a blank is added before every text.
        removes_blanks: Whether blanks at both ends and repeated ones are dropped.
        escapes_blanks: Whether a blank is encoded as U+2581.
        changes_decoded: Whether texts are rewritten after decoding.
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
    """Parse the bytes of a sentencepiece file.

    Field numbers and defaults are those of sentencepiece's protobuf definition.

    Raises:
        ValueError: The bytes are no such file, or are cut off.
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
    fields = dict(_fields(content))
    return VocabularyPiece(
        fields.get(1, b"").decode(),
        struct.unpack("<f", fields.get(2, bytes(4)))[0],
        fields.get(3, NORMAL),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, content) of every field of a protobuf message.

    The content is an int for varints, otherwise the bytes.
    """
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
