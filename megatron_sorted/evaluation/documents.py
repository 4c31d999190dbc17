"""Texts to measure on: plain files cut at a separator, or JSON lines of texts, instructions and messages."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.data.jsonl import read_blocks, records
from megatron_sorted.data.templates import TEMPLATES, BrokenSampleError, Part, detect_format, parts_of
from megatron_sorted.errors import DataError
from megatron_sorted.exported.tokenizer import encode_texts, prefix_id
from megatron_sorted.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """One text: parts that are counted (of an instruction the response) and parts that are only read."""

    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """Returns the UTF-8 bytes of what is counted."""
        return sum(len(part.text.encode()) for part in self.parts if part.is_response)


@dataclass(frozen=True)
class EncodedDocument:
    """A document as tokens.

    Attributes:
        ids: The prefix (bos or eos), then the text.
        counted: Of every id whether its prediction is counted; never the prefix.
    """

    ids: list[int]
    counted: list[bool]


def read_documents(path: Path, separator: str | None = None, template: str = "plain", limit: int | None = None) -> list[Document]:
    """Returns the documents of a file: ``.jsonl`` (or ``.jsonl.gz``) by lines, other files cut at ``separator``.

    Blanks around a cut-out text are dropped, and texts of nothing else.

    Raises:
        DataError: The file is missing, is no text, has a line that cannot be used, or nothing in it.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        documents = _json_documents(path, template, limit)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}). Give a text file that exists.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start}. Give a text file.") from error
        texts = [piece.strip() for piece in text.split(separator)] if separator else [text]
        documents = [Document((Part(piece, True),)) for piece in texts if piece.strip()][:limit]
    if not documents:
        raise DataError(f"{path}: no text in it. Give a file with text to measure on.")
    return documents


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer, append_eos: bool = False) -> list[EncodedDocument]:
    """Returns every document as tokens; prompts and responses are encoded apart, as in data preparation.

    Args:
        append_eos: Each counted part ends with eos, which is counted too (it has no bytes).

    Raises:
        DataError: The tokenizer has no token to begin with, or none to end with.
    """
    first, last = prefix_id(tokenizer), tokenizer.eos_id
    if append_eos and last is None:
        raise DataError("--append-eos: the tokenizer has no eos. Leave the option out.")
    encoded = iter(encode_texts(tokenizer, [part.text for document in documents for part in document.parts]))
    sequences = []
    for document in documents:
        ids, counted = [first], [False]
        for part in document.parts:
            tokens = next(encoded) + ([last] if append_eos and part.is_response else [])
            ids += tokens
            counted += [part.is_response] * len(tokens)
        sequences.append(EncodedDocument(ids, counted))
    return sequences


def _json_documents(path: Path, template: str, limit: int | None) -> list[Document]:
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give a text file that exists.")
    documents: list[Document] = []
    for block in read_blocks([str(path)], limit):
        for number, record, reason in records(block):
            try:
                if reason is not None or (kind := detect_format(record)) is None:
                    raise BrokenSampleError(reason or "needs a field 'text', 'instruction' or 'messages'")
                parts = parts_of(record, kind, TEMPLATES[template])
                for part in parts:
                    part.text.encode()  # JSON can spell half a surrogate pair, which is no text
            except (BrokenSampleError, UnicodeEncodeError) as error:
                reason = "invalid_unicode" if isinstance(error, UnicodeEncodeError) else error
                raise DataError(f"{path}:{number}: {reason}. Mend or remove the line.") from error
            documents.append(Document(tuple(parts)))
    return documents
