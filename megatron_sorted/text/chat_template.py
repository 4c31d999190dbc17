"""Chat templates (jinja), rendered as transformers renders them."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError

from megatron_sorted.errors import DataError
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.sandbox import BEGIN, END, MAX_RENDERED_CHARACTERS, BoundedEnvironment

MAX_TEMPLATE_CHARACTERS = 262_144
"""Largest length of a template; the longest public ones have about 30,000 characters."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the field with a message's reasoning; templates read the first, gpt-oss's the second."""


class TemplateRefusal(ValueError):
    """An error of a template that rejects a conversation; its argument is the reason."""


def messages_for_template(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in the form that templates read.

    Keys whose value is None are left out; reasoning stands under each name that templates read.
    """
    result = []
    for message in messages:
        kept = {name: value for name, value in message.items() if value is not None}
        reasoning = next((kept[name] for name in REASONING if name in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        result.append(kept)
    return result


class ChatTemplate:
    """A compiled template.

    Args:
        text: The jinja source.
        where: The template's name, for messages.

    Raises:
        DataError: It is too large, or not a template.
    """

    def __init__(self, text: str, where: str):
        if len(text) > MAX_TEMPLATE_CHARACTERS:
            raise DataError(
                f"{where}: {len(text):,} characters, more than the {MAX_TEMPLATE_CHARACTERS:,} "
                "of any sensible template. Give a smaller one."
            )
        self.text, self.where = text, where
        self.has_generation = GENERATION.search(text) is not None
        self._environment = BoundedEnvironment()
        try:
            self._template = self._environment.from_string(text)
        except (TemplateError, RecursionError, ValueError, SyntaxError, MemoryError) as error:
            raise DataError(
                f"{where}: not a template that jinja can read ({_short(error)}). Correct it, or "
                "use --prompt-template plain."
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, str],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
    ) -> str:
        """Return the text of a conversation.

        It equals transformers' ``apply_chat_template(..., tokenize=False)``.

        Args:
            messages: The messages: role, content and what else the template reads.
            tokens: The names of special tokens (``bos_token`` ...) and how they are written.
            add_generation_prompt: Whether the text ends where the assistant begins to answer.
            tools: JSON schemas of functions that may be called.
            documents: Documents that may be looked up.

        Raises:
            TemplateRefusal: The template rejects the conversation.
        """
        return self._render(messages, tokens, add_generation_prompt, tools, documents, False)

    def generation_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, str],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation and the spans of its `{% generation %}` blocks.

        Raises:
            TemplateRefusal: The template rejects the conversation.
        """
        marked = self._render(messages, tokens, False, tools, documents, True)
        text, spans, begin = [], [], None
        length = 0
        for piece in re.split(f"([{BEGIN}{END}])", marked):
            if piece == BEGIN:
                begin = length
            elif piece == END:
                if begin is not None and length > begin:
                    spans.append((begin, length))
                begin = None
            else:
                text.append(piece)
                length += len(piece)
        return "".join(text), spans

    def _render(self, messages, tokens, add_generation_prompt, tools, documents, marks) -> str:
        environment = self._environment
        environment.marks, environment.work = marks, 0
        parts, length = [], 0
        try:
            for part in self._template.generate(
                messages=messages_for_template(messages),
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **tokens,
            ):
                parts.append(part)
                length += len(part)
                if length > MAX_RENDERED_CHARACTERS:
                    raise SecurityError(
                        f"the template writes more than {MAX_RENDERED_CHARACTERS:,} characters "
                        "for one conversation"
                    )
        # templates may raise errors of any class, also TypeError and RecursionError
        except Exception as error:
            raise TemplateRefusal(_short(error)) from error
        return "".join(parts)


@lru_cache(maxsize=16)
def compiled(text: str, where: str) -> ChatTemplate:
    """Return a template, compiled once; errors are those of ``ChatTemplate``."""
    return ChatTemplate(text, where)


def _short(error: BaseException) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    return shown(message, 200)
