"""Texts to measure on: plain files cut at a separator, or JSON lines of texts, instructions and messages."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.data.preparation.forms import SampleReader
from megatron_sorted.data.preparation.templates import (
    BrokenSampleError,
    conversation_of,
    detect_format,
    holds_records,
    text_of,
    turns_of,
)
from megatron_sorted.errors import DataError
from megatron_sorted.exported.tokenizer import prefix_id
from megatron_sorted.reading.json_lines import read_records
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import read_text
from megatron_sorted.text.conversation import SkippedConversationError
from megatron_sorted.text.piece_ids import PieceEncoder
from megatron_sorted.text.prompt_form import PromptForm
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.written_forms import write_plain

MEND = "Mend or remove the line."


@dataclass(frozen=True)
class Document:
    """One text, instruction or conversation; of the last two the answers are counted.

    Attributes:
        record: As a line of JSON has it.
        kind: text, instruction or messages.
    """

    record: dict[str, Any]
    kind: str

    @property
    def counted_texts(self) -> list[str]:
        """Return what is counted: the text, or the answers."""
        if self.kind == "text":
            return [self.record["text"]]
        messages = conversation_of(self.record, self.kind).messages
        return [
            message["content"]
            for message in messages
            if message["role"] == "assistant" and isinstance(message.get("content"), str)
        ]

    @property
    def num_bytes(self) -> int:
        """Return the UTF-8 bytes of what is counted."""
        return sum(len(text.encode()) for text in self.counted_texts)


@dataclass(frozen=True)
class EncodedDocument:
    """A document as tokens.

    Attributes:
        ids: The prefix (bos or eos), then the text.
        counted: Of every id whether its prediction is counted; never the prefix.
    """

    ids: list[int]
    counted: list[bool]


def read_documents(
    path: Path, separator: str | None = None, limit: int | None = None
) -> list[Document]:
    """Return the documents of a file: those of JSON lines or records, or a text cut at ``separator``; plain or gzipped.

    What it holds is told by its content; a name that promises JSON is kept to. Blanks around a cut-out
    text are dropped, and texts of nothing else.

    Raises:
        DataError: The file is missing, is no text, has a line that cannot be used, or nothing in it.
    """
    if holds_records(path):
        documents = _json_documents(path, limit)
    else:
        text = read_text(path)
        texts = [piece.strip() for piece in text.split(separator)] if separator else [text]
        documents = [Document({"text": piece}, "text") for piece in texts if piece.strip()][:limit]
    if not documents:
        raise DataError(f"{shown(path)}: no text in it. Give a file with text to measure on.")
    return documents


def encode_documents(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    append_eos: bool = False,
    form: PromptForm | None = None,
) -> list[EncodedDocument]:
    """Return every document as tokens, conversations as training has them.

    Args:
        documents: Texts, instructions, conversations.
        tokenizer: Of the model.
        append_eos: Each counted part ends with its end token, which is counted too (it has no bytes).
        form: Of conversations; None: plain with prompts and answers encoded apart, as before version 0.7.

    Raises:
        DataError: The tokenizer has no token to begin with, or none to end with, or a conversation cannot be written in the form.
    """
    first, last = prefix_id(tokenizer), tokenizer.eos_id
    if append_eos and last is None:
        raise DataError("--append-eos: the tokenizer has no eos. Leave the option out.")
    whole = [document for document in documents if form is not None and document.kind != "text"]
    formed = (
        _by_form(whole, tokenizer, append_eos, form) if form is not None and whole else iter(())
    )
    parts = {
        id(document): _parts(document)
        for document in documents
        if form is None or document.kind == "text"
    }
    encoded = iter(tokenizer.encode_batch([text for found in parts.values() for text, _ in found]))
    sequences: list[EncodedDocument] = []
    for document in documents:
        if id(document) not in parts:
            sequences += next(formed)
            continue
        ids, counted = [first], [False]
        for _, is_response in parts[id(document)]:
            tokens = next(encoded) + ([last] if append_eos and is_response else [])
            ids += tokens
            counted += [is_response] * len(tokens)
        sequences.append(EncodedDocument(ids, counted))
    return sequences


def _parts(document: Document) -> list[tuple[str, bool]]:
    """Return the texts of a document that are encoded apart, and which are counted."""
    if document.kind == "text":
        return [(document.record["text"], True)]
    parts: list[tuple[str, bool]] = []
    prompt = ""
    for turn in turns_of(document.record, document.kind):
        if turn.role != "assistant":
            prompt += write_plain(turn, False)
            continue
        parts += [*([(prompt, False)] if prompt else []), (turn.content, True)]
        prompt = ""
    return parts


def _by_form(
    documents: Sequence[Document], tokenizer: Tokenizer, append_eos: bool, form: PromptForm
) -> Iterator[list[EncodedDocument]]:
    """Yield what each instruction or conversation becomes: one document, or several where a template rewrites earlier turns."""
    ends = set(form.end_ids)
    readers = {
        kind: SampleReader.of_form(form, kind, tokenizer)
        for kind in {document.kind for document in documents}
    }
    pieces = PieceEncoder(tokenizer, [end.text for end in form.ends])
    for document in documents:
        try:
            sample = readers[document.kind].read(document.record)
        except (BrokenSampleError, SkippedConversationError) as error:
            words = ": ".join(filter(None, error.args))
            raise DataError(
                f"{shown(document.record, 60)}: cannot be written in the form {form.label} ({shown(words)}). Leave it "
                "out, or give --prompt-template."
            ) from error
        found = []
        for sequences in (one for some in pieces.encode(sample.documents) for one in some):
            ids = [token for part, _ in sequences for token in part]
            counted = [
                is_response and (append_eos or token not in ends)
                for part, is_response in sequences
                for token in part
            ]
            found.append(EncodedDocument(ids, [False, *counted[1:]]))
        yield found


def _json_documents(path: Path, limit: int | None) -> list[Document]:
    documents: list[Document] = []
    for place, record in read_records(path, MEND, limit):
        try:
            if (kind := detect_format(record)) is None:
                raise BrokenSampleError("needs a field 'text', 'instruction' or 'messages'")
            if kind == "text":
                text_of(record)
            elif not any(
                message["role"] == "assistant" for message in conversation_of(record, kind).messages
            ):
                raise BrokenSampleError("no_assistant_turn")
            json.dumps(
                record, ensure_ascii=False
            ).encode()  # JSON can spell half a surrogate pair, which is no text
        except (BrokenSampleError, UnicodeEncodeError) as error:
            reason = "invalid_unicode" if isinstance(error, UnicodeEncodeError) else error
            raise DataError(f"{place}: {reason}. {MEND}") from error
        documents.append(Document(record, kind))
    return documents
