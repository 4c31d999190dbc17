"""Reader of records of a file as documents of text spans, in the chosen form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sorted.data.preparation.templates import (
    conversation_of,
    format_of_row,
    text_of,
    turns_of,
)
from megatron_sorted.errors import DataError
from megatron_sorted.text.conversation import ConversationWriter, TextSpan, chat_form
from megatron_sorted.text.prompt_form import ALPACA, CHAT, PLAIN, PromptForm, parse_label
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.written_forms import text_form, written_form, written_spans

AUTO = "auto"
"""The tokenizer's own template for messages if it has one, else plain."""


@dataclass(frozen=True)
class ConversationSample:
    """One usable record.

    Attributes:
        documents: The spans of each of its documents; several where a template rewrites earlier
            turns.
        key: The text that decides between training and validation, without what the tokenizer adds.
    """

    documents: list[list[TextSpan]]
    key: str


class SampleReader:
    """A reader of records of one format in one form.

    Args:
        data_format: messages, instruction or text.
        label: "plain", "alpaca", "chat", "chat:NAME" or "auto".
        tokenizer: The tokenizer with the control tokens and templates.
        append_eod: Whether answers and texts end with eos.
        takes_both: Whether a row that has only the other format of a conversation (messages,
            instruction) is read as that.

    Attributes:
        form: The form that was chosen.

    Raises:
        DataError: The tokenizer has no such template, or it does not show which text is an answer.
    """

    def __init__(
        self,
        data_format: str,
        label: str,
        tokenizer: Tokenizer,
        append_eod: bool = True,
        takes_both: bool = False,
    ):
        self._takes_both = takes_both
        if data_format == "text":
            self._set(text_form(tokenizer, append_eod), data_format)
            return
        name, template = parse_label(resolved_label(label, data_format, tokenizer))
        if name == CHAT:
            if not append_eod:
                raise DataError(
                    "--no-append-eod: the chat template itself writes the end of an answer. Leave "
                    "the option out, or use --prompt-template plain."
                )
            form, conversations = chat_form(tokenizer, template)
            self._set(form, data_format, conversations)
        else:
            self._set(
                written_form(
                    name, tokenizer, name == ALPACA and data_format == "instruction", append_eod
                ),
                data_format,
            )

    @classmethod
    def of_form(cls, form: PromptForm, data_format: str, tokenizer: Tokenizer) -> "SampleReader":
        """Return a reader for a form that came with a model; errors are those of a new one."""
        reader = cls.__new__(cls)
        reader._takes_both = False
        conversations = (
            ConversationWriter(form.template, form.label, tokenizer)
            if form.name == CHAT and data_format != "text"
            else None
        )
        reader._set(form, data_format, conversations)
        return reader

    def _set(
        self, form: PromptForm, data_format: str, conversations: ConversationWriter | None = None
    ) -> None:
        self.form, self.data_format, self._chat = form, data_format, conversations
        self._opens = form.name == ALPACA and data_format == "instruction"
        self._read: Callable[[Any], ConversationSample] = (
            self._text
            if data_format == "text"
            else self._conversation
            if conversations is not None
            else self._written
        )

    def read(self, record: Any) -> ConversationSample:
        """Return the documents of a record.

        Raises:
            BrokenSampleError: It has another shape, or nothing to train on; its argument is the
                reason.
            SkippedConversationError: The template rejects it.
        """
        return self._read(record)

    def _format_of(self, record: Any) -> str:
        return format_of_row(record, self.data_format) if self._takes_both else self.data_format

    def _text(self, record: Any) -> ConversationSample:
        text = text_of(record)
        return ConversationSample([[TextSpan(text, True)]], text)

    def _written(self, record: Any) -> ConversationSample:
        turns = turns_of(record, self._format_of(record))
        spans = written_spans(self.form, turns, self._opens)
        begin, end = self.form.begin, self.form.ends[0].text if self.form.ends else ""
        texts = [span.text.removesuffix(end) if span.is_response else span.text for span in spans]
        if begin is not None:
            texts[0] = texts[0].removeprefix(begin.text)
        return ConversationSample([spans], "\0".join(texts))

    def _conversation(self, record: Any) -> ConversationSample:
        conversation = conversation_of(record, self._format_of(record))
        documents = self._chat.documents(
            conversation.messages, conversation.tools, conversation.documents
        )
        return ConversationSample(documents, "".join(span.text for span in documents[-1]))


def resolved_label(label: str, data_format: str, tokenizer: Tokenizer) -> str:
    """Return the label of a form, with "auto" resolved."""
    if label != AUTO:
        return label
    return CHAT if data_format == "messages" and tokenizer.chat_templates else PLAIN
