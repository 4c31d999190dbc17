"""Documents to evaluate on: plain text, or JSON lines of texts, instructions and conversations."""

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
from megatron_sorted.text.prompt_form import PromptForm
from megatron_sorted.text.span_ids import SpanEncoder
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.written_forms import write_plain

REMEDY = "Correct or remove the line."


@dataclass(frozen=True)
class Document:
    """A text, instruction or conversation. Of the last two only the answers are counted.

    Attributes:
        record: The JSON object.
        kind: Kind of the record: text, instruction or messages.
    """

    record: dict[str, Any]
    kind: str

    @property
    def counted_texts(self) -> list[str]:
        """Return the counted texts: the text itself, or the answers."""
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
        """Return the number of UTF-8 bytes of the counted texts."""
        return sum(len(text.encode()) for text in self.counted_texts)


@dataclass(frozen=True)
class EncodedDocument:
    """The tokens of a document.

    Attributes:
        ids: Tokens: the prefix (bos or eos), then the text.
        counted: Whether the prediction of each token is counted; never that of the prefix.
    """

    ids: list[int]
    counted: list[bool]


def read_documents(
    path: Path, separator: str | None = None, limit: int | None = None
) -> list[Document]:
    """Return the documents of a plain or gzipped file: JSON lines or records, or split text.

    The file's content decides which it is, but a name that promises JSON is binding. Blanks around
    a split text are dropped, and so are empty texts.

    Args:
        path: The file.
        separator: Separator of the texts of a plain file; None for a single text.
        limit: Maximum number of documents; None for all.

    Raises:
        DataError: The file is missing, empty or no text, or a line cannot be used.
    """
    if holds_records(path):
        documents = _json_documents(path, limit)
    else:
        text = read_text(path)
        texts = [part.strip() for part in text.split(separator)] if separator else [text]
        documents = [Document({"text": part}, "text") for part in texts if part.strip()][:limit]
    if not documents:
        raise DataError(f"{shown(path)}: no text in it. Give a file with text to measure on.")
    return documents


def encode_documents(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    append_eos: bool = False,
    form: PromptForm | None = None,
) -> list[EncodedDocument]:
    """Return the tokens of every document, of conversations as in training.

    Args:
        documents: Texts, instructions and conversations.
        tokenizer: Tokenizer of the model.
        append_eos: Whether each counted part ends with its end token, which is counted too (it has
            no bytes).
        form: Form of conversations; None for plain text with prompts and answers encoded
            separately, as before version 0.7.

    Raises:
        DataError: The tokenizer has no token for the beginning or the end, or a conversation cannot
            be written in the form.
    """
    first, last = prefix_id(tokenizer), tokenizer.eos_id
    if append_eos and last is None:
        raise DataError("--append-eos: the tokenizer has no eos. Leave the option out.")
    whole = [document for document in documents if form is not None and document.kind != "text"]
    formed = _encode_in_form(whole, tokenizer, append_eos, form) if whole else iter(())
    parts = {
        id(document): _parts(document)
        for document in documents
        if form is None or document.kind == "text"
    }
    encoded = iter(tokenizer.encode_batch([text for some in parts.values() for text, _ in some]))
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
    """Return the texts of a document that are encoded separately, and whether each is counted."""
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


def _encode_in_form(
    documents: Sequence[Document], tokenizer: Tokenizer, append_eos: bool, form: PromptForm
) -> Iterator[list[EncodedDocument]]:
    """Yield the tokens of each instruction or conversation.

    A conversation becomes several documents if a template rewrites earlier turns.
    """
    ends = set(form.end_ids)
    readers = {
        kind: SampleReader.of_form(form, kind, tokenizer)
        for kind in {document.kind for document in documents}
    }
    pieces = SpanEncoder(tokenizer, [end.text for end in form.ends])
    for document in documents:
        try:
            sample = readers[document.kind].read(document.record)
        except (BrokenSampleError, SkippedConversationError) as error:
            reason = ": ".join(filter(None, error.args))
            raise DataError(
                f"{shown(document.record, 60)}: cannot be written in the form {form.label} "
                f"({shown(reason)}). Leave it out, or give --prompt-template."
            ) from error
        encoded = []
        for parts in (one for some in pieces.encode(sample.documents) for one in some):
            ids = [token for part, _ in parts for token in part]
            counted = [
                is_response and (append_eos or token not in ends)
                for part, is_response in parts
                for token in part
            ]
            encoded.append(EncodedDocument(ids, [False, *counted[1:]]))
        yield encoded


def _json_documents(path: Path, limit: int | None) -> list[Document]:
    documents: list[Document] = []
    for place, record in read_records(path, REMEDY, limit):
        try:
            if (kind := detect_format(record)) is None:
                raise BrokenSampleError("needs a field 'text', 'instruction' or 'messages'")
            if kind == "text":
                text_of(record)
            elif not any(
                message["role"] == "assistant" for message in conversation_of(record, kind).messages
            ):
                raise BrokenSampleError("no_assistant_turn")
            # JSON can spell half a surrogate pair, which is no text
            json.dumps(record, ensure_ascii=False).encode()
        except (BrokenSampleError, UnicodeEncodeError) as error:
            reason = "invalid_unicode" if isinstance(error, UnicodeEncodeError) else error
            raise DataError(f"{place}: {reason}. {REMEDY}") from error
        documents.append(Document(record, kind))
    return documents
