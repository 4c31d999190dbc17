"""The form of a conversation: which text, and which tokens, a model was trained to answer; it travels with data and weights."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import parse_json, read_bounded
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.chat_template import MOST_TEMPLATE_CHARACTERS, TemplateRefusal, compiled
from megatron_sorted.text.tokenizer.contract import Tokenizer

FILE = "prompt_form.json"
"""Beside a model, in a checkpoint's folder of the tokenizer, and beside an adapter."""
FORMAT = 1
PLAIN, ALPACA, CHAT, TEXT = "plain", "alpaca", "chat", "text"
FORMS = (PLAIN, ALPACA, CHAT)
MOST_FILE_BYTES = 4 << 20
REMEDY = "Restore it, or remove it and say --prompt-template."
NO_FORM = (
    "carries no prompt form (it was made by megatron_sorted 0.6.0 or before, or by another tool)"
)


@dataclass(frozen=True)
class ControlToken:
    """A control token: how it is written, and its id."""

    text: str
    id: int


@dataclass(frozen=True, eq=False)
class PromptForm:
    """A form of conversation.

    Attributes:
        name: "plain", "alpaca", "chat" (a tokenizer's own template), or "text" (documents, no conversation).
        template: Jinja, as transformers' ``apply_chat_template`` takes it; empty for text.
        special_tokens: {"bos_token": "<s>", ...}, which the template may name.
        begin: The token that every conversation and text begins with, if any.
        ends: The tokens that answers were trained to end with.
        template_name: Of several templates of a tokenizer, which.
    """

    name: str
    template: str
    special_tokens: Mapping[str, str]
    begin: ControlToken | None
    ends: tuple[ControlToken, ...]
    template_name: str | None = None

    @property
    def label(self) -> str:
        """Return the name as ``--prompt-template`` takes it."""
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
        """Return whether it says how a conversation is written."""
        return self.name != TEXT

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> str:
        """Return the text of a conversation up to where the assistant answers.

        Raises:
            DataError: The template does not take these messages.
        """
        try:
            return compiled(self.template, f"chat template ({self.label})").render(
                messages, self.special_tokens, True, tools
            )
        except TemplateRefusal as error:
            raise DataError(
                f"messages: the chat template ({self.label}) does not take them ({error}). "
                "Change roles, order or fields."
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """Return the form as plain data."""
        return {"format": FORMAT, **asdict(self), "ends": [asdict(end) for end in self.ends]}

    def as_json(self) -> str:
        """Return the content of a file of this form."""
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=True) + "\n"


def form_from_dict(said: Any, where: str) -> PromptForm:
    """Return the form that plain data describe.

    Args:
        said: As ``PromptForm.as_dict`` writes it.
        where: Its place, for messages.

    Raises:
        DataError: It is no form.
    """
    try:
        if said["format"] != FORMAT:
            raise ValueError(f"format {said['format']!r:.40}, but this version reads {FORMAT}")
        begin, ends = said["begin"], said["ends"]
        form = PromptForm(
            said["name"],
            said["template"],
            dict(said["special_tokens"]),
            begin and _token(begin),
            tuple(map(_token, ends)),
            said.get("template_name"),
        )
        texts = (form.template, *form.special_tokens, *form.special_tokens.values())
        if form.name not in (*FORMS, TEXT) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"unknown form {form.name!r:.40}")
        if len(form.template) > MOST_TEMPLATE_CHARACTERS or len(form.ends) > 64:
            raise ValueError("larger than any sensible form")
        return form
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{shown(where)}: not a prompt form as megatron_sorted writes it ({shown(error)}). {REMEDY}"
        ) from error


def _token(said: Mapping[str, Any]) -> ControlToken:
    text, number = said["text"], said["id"]
    if (
        not isinstance(text, str)
        or not isinstance(number, int)
        or isinstance(number, bool)
        or not 0 <= number < 1 << 31
    ):
        raise ValueError(f"{said!r:.60} is no token")
    return ControlToken(text, number)


def read_form(directory: Path) -> PromptForm | None:
    """Return the form beside a model; None where there is none.

    Raises:
        DataError: It is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    return form_from_bytes(read_bounded(path, REMEDY, most_bytes=MOST_FILE_BYTES), str(path))


def form_from_bytes(content: bytes, where: str) -> PromptForm:
    """Return the form in a file's content.

    Raises:
        DataError: It is none.
    """
    return form_from_dict(parse_json(content, where, REMEDY), where)


def parse_label(label: str) -> tuple[str, str | None]:
    """Return name and template of a ``--prompt-template``.

    Raises:
        DataError: There is no such form.
    """
    name, colon, template = label.partition(":")
    if name not in FORMS or (colon and (name != CHAT or not template)):
        raise DataError(
            f"--prompt-template: {label!r} is unknown. Use plain, alpaca, chat (the tokenizer's own template) or chat:NAME "
            "(one of several)."
        )
    return name, template or None


def check_tokens(form: PromptForm, tokenizer: Tokenizer, where: str) -> None:
    """Check that the tokenizer writes the form's tokens with the ids that were trained.

    Raises:
        DataError: It does not, so that a model would be asked, or stop, in other tokens than it was trained with.
    """
    for what, token in (
        *((("first token", form.begin),) if form.begin else ()),
        *(("end token", end) for end in form.ends),
    ):
        ids = tokenizer.encode_rendered(token.text)
        if ids != [token.id]:
            raise DataError(
                f"{where}: its {what} {token.text!r} was trained as id {token.id}, but {tokenizer.name} reads it as "
                f"{', '.join(map(str, ids[:8])) or 'nothing'}. Use the tokenizer that the model was trained with."
            )


def check_rows(form: PromptForm, vocab_size: int, where: str) -> None:
    """Check that a model of this vocabulary can write the form's end tokens.

    Raises:
        DataError: It has no row for one.
    """
    for end in form.ends:
        if end.id >= vocab_size:
            raise DataError(
                f"{where}: answers end with {end.text!r}, id {end.id}, but the model has {vocab_size} tokens, so it can never "
                "stop. Use the tokenizer of this model, or give the model more rows."
            )


def end_tokens(value: Any, where: str, vocab_size: int | float = math.inf) -> tuple[int, ...]:
    """Return the ids of an ``eos_token_id``: a number, a list of numbers, or None.

    Args:
        value: As a JSON file says.
        where: The file, for messages.
        vocab_size: Of the model.

    Raises:
        DataError: It is none, or no token of the model.
    """
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < vocab_size:
            rule = (
                f"one of the model's 0..{vocab_size - 1}" if vocab_size != math.inf else "a token"
            )
            raise DataError(
                f"{where}: eos_token_id {one!r:.40} is not {rule}. Mend the file, or give an intact directory."
            )
    return tuple(ids)
