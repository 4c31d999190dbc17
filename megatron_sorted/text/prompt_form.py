"""The form of a conversation: the text, and the tokens, that a model was trained to answer.

It is stored with data and weights.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import parse_json, read_bounded
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.chat_template import MAX_TEMPLATE_CHARACTERS, TemplateRefusal, compiled
from megatron_sorted.text.tokenizer.contract import Tokenizer

FILE = "prompt_form.json"
"""The name of the file beside a model, in a checkpoint's tokenizer folder, and beside an adapter.
"""
FORMAT = 1
PLAIN, ALPACA, CHAT, TEXT = "plain", "alpaca", "chat", "text"
FORMS = (PLAIN, ALPACA, CHAT)
MAX_FILE_BYTES = 4 << 20
REMEDY = "Restore it, or remove it and give --prompt-template."
NO_FORM = "has no prompt form (it was made by megatron_sorted 0.6.0 or before, or by another tool)"


@dataclass(frozen=True)
class ControlToken:
    """A control token: its text and its id."""

    text: str
    id: int


@dataclass(frozen=True, eq=False)
class PromptForm:
    """A form of conversation.

    Attributes:
        name: "plain", "alpaca", "chat" (a tokenizer's own template), or "text" (documents instead
            of conversations).
        template: The jinja source, as transformers' ``apply_chat_template`` reads it; empty for
            text.
        special_tokens: {"bos_token": "<s>", ...}, which the template may use.
        begin: The token that every conversation and text begins with, if any.
        ends: The tokens that answers were trained to end with.
        template_name: The name of the template, if the tokenizer has several.
    """

    name: str
    template: str
    special_tokens: Mapping[str, str]
    begin: ControlToken | None
    ends: tuple[ControlToken, ...]
    template_name: str | None = None

    @property
    def label(self) -> str:
        """Return the name as ``--prompt-template`` accepts it."""
        return (
            self.name
            if self.template_name in (None, "default")
            else f"{self.name}:{self.template_name}"
        )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return the ids of the end tokens."""
        return tuple(end.id for end in self.ends)

    @property
    def is_conversation(self) -> bool:
        """Return whether it is a form of conversations, not of documents."""
        return self.name != TEXT

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> str:
        """Return the text of a conversation up to where the assistant answers.

        Raises:
            DataError: The template rejects these messages.
        """
        try:
            return compiled(self.template, f"chat template ({self.label})").render(
                messages, self.special_tokens, True, tools
            )
        except TemplateRefusal as error:
            raise DataError(
                f"messages: the chat template ({self.label}) rejects them ({error}). Change "
                "roles, order or fields."
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """Return the form as plain data."""
        return {"format": FORMAT, **asdict(self), "ends": [asdict(end) for end in self.ends]}

    def as_json(self) -> str:
        """Return the content of a file of this form."""
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=True) + "\n"


def form_from_dict(fields: Any, where: str) -> PromptForm:
    """Return the form that plain data describe.

    Args:
        fields: The plain data, as ``PromptForm.as_dict`` returns them.
        where: The name of their file, for messages.

    Raises:
        DataError: They are not a prompt form.
    """
    try:
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r:.40}, but this version reads {FORMAT}")
        begin, ends = fields["begin"], fields["ends"]
        form = PromptForm(
            fields["name"],
            fields["template"],
            dict(fields["special_tokens"]),
            begin and _token(begin),
            tuple(map(_token, ends)),
            fields.get("template_name"),
        )
        texts = (form.template, *form.special_tokens, *form.special_tokens.values())
        if form.name not in (*FORMS, TEXT) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"unknown form {form.name!r:.40}")
        if len(form.template) > MAX_TEMPLATE_CHARACTERS or len(form.ends) > 64:
            raise ValueError("larger than any sensible form")
        return form
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{shown(where)}: not a prompt form as megatron_sorted writes it ({shown(error)}). "
            f"{REMEDY}"
        ) from error


def _token(fields: Mapping[str, Any]) -> ControlToken:
    text, number = fields["text"], fields["id"]
    if (
        not isinstance(text, str)
        or not isinstance(number, int)
        or isinstance(number, bool)
        or not 0 <= number < 1 << 31
    ):
        raise ValueError(f"{fields!r:.60} is not a token")
    return ControlToken(text, number)


def read_form(directory: Path) -> PromptForm | None:
    """Return the form beside a model; None if there is none.

    Raises:
        DataError: It is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    return form_from_bytes(read_bounded(path, REMEDY, max_bytes=MAX_FILE_BYTES), str(path))


def form_from_bytes(content: bytes, where: str) -> PromptForm:
    """Return the form in a file's content.

    Raises:
        DataError: It is not a prompt form.
    """
    return form_from_dict(parse_json(content, where, REMEDY), where)


def parse_label(label: str) -> tuple[str, str | None]:
    """Return name and template of a ``--prompt-template``.

    >>> parse_label("chat:tool_use")
    ('chat', 'tool_use')

    Raises:
        DataError: There is no such form.
    """
    name, colon, template = label.partition(":")
    if name not in FORMS or (colon and (name != CHAT or not template)):
        raise DataError(
            f"--prompt-template: {label!r} is unknown. Use plain, alpaca, chat (the tokenizer's "
            "own template) or chat:NAME (one of several)."
        )
    return name, template or None


def check_tokens(form: PromptForm, tokenizer: Tokenizer, where: str) -> None:
    """Check that the tokenizer encodes the form's tokens with the ids that were trained.

    Raises:
        DataError: It does not, so that a model would be prompted, or stop, with other tokens than
            it was trained with.
    """
    for what, token in (
        *((("first token", form.begin),) if form.begin else ()),
        *(("end token", end) for end in form.ends),
    ):
        ids = tokenizer.encode_rendered(token.text)
        if ids != [token.id]:
            raise DataError(
                f"{where}: its {what} {token.text!r} was trained as id {token.id}, but "
                f"{tokenizer.name} reads it as {', '.join(map(str, ids[:8])) or 'nothing'}. Use "
                "the tokenizer that the model was trained with."
            )


def check_rows(form: PromptForm, vocab_size: int, where: str) -> None:
    """Check that a model with this vocabulary can write the form's end tokens.

    Raises:
        DataError: The model has no row for one.
    """
    for end in form.ends:
        if end.id >= vocab_size:
            raise DataError(
                f"{where}: answers end with {end.text!r}, id {end.id}, but the model has "
                f"{vocab_size} tokens, so it can never stop. Use the tokenizer of this model, or "
                "give the model more rows."
            )


def end_tokens(value: Any, where: str, vocab_size: int | float = math.inf) -> tuple[int, ...]:
    """Return the ids of an ``eos_token_id``: a number, a list of numbers, or None.

    Args:
        value: The value in a JSON file.
        where: The file, for messages.
        vocab_size: The number of tokens of the model.

    Raises:
        DataError: It is no such value, or not a token of the model.
    """
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < vocab_size:
            rule = (
                f"one of the model's 0..{vocab_size - 1}" if vocab_size != math.inf else "a token"
            )
            raise DataError(
                f"{where}: eos_token_id {number!r:.40} is not {rule}. Correct the file, or give "
                "an intact directory."
            )
    return tuple(ids)
