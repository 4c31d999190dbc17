"""Chat templates (jinja) rendered as transformers renders them."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError

from megatron_sorted.errors import DataError
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.sandbox import BEGIN, END, MOST_RENDERED_CHARACTERS, BoundedEnvironment

MOST_TEMPLATE_CHARACTERS = 262_144
"""The longest public templates have about 30,000."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; templates read the first, gpt-oss's the second."""


class TemplateRefusal(ValueError):
    """A template does not take a conversation; its argument says why."""


def as_template_sees(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages without keys whose value is None, and with their reasoning under the names that templates read."""
    found = []
    for message in messages:
        kept = {name: value for name, value in message.items() if value is not None}
        reasoning = next((kept[name] for name in REASONING if name in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        found.append(kept)
    return found


class ChatTemplate:
    """A compiled template.

    Args:
        text: Jinja.
        where: Its name, for messages.

    Raises:
        DataError: It is too large, or no template.
    """

    def __init__(self, text: str, where: str):
        if len(text) > MOST_TEMPLATE_CHARACTERS:
            raise DataError(
                f"{where}: {len(text):,} characters, more than the {MOST_TEMPLATE_CHARACTERS:,} of any sensible template. "
                "Give a smaller one."
            )
        self.text, self.where, self.has_generation = (
            text,
            where,
            GENERATION.search(text) is not None,
        )
        self._environment = BoundedEnvironment()
        try:
            self._template = self._environment.from_string(text)
        except (TemplateError, RecursionError, ValueError, SyntaxError, MemoryError) as error:
            raise DataError(
                f"{where}: not a template that jinja can read ({_short(error)}). Mend it, or use --prompt-template "
                "plain."
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, str],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
    ) -> str:
        """Return the text of a conversation, equal to transformers' ``apply_chat_template(..., tokenize=False)``.

        Args:
            messages: Role, content and what else the template reads.
            tokens: Names of special tokens (``bos_token`` ...) and how they are written.
            add_generation_prompt: Whether it ends where the assistant begins to answer.
            tools: JSON schemas of functions that may be called.
            documents: What may be looked up.

        Raises:
            TemplateRefusal: The template does not take it.
        """
        return self._render(messages, tokens, add_generation_prompt, tools, documents, False)

    def generation_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, str],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation and where the template's `{% generation %}` blocks stand in it.

        Raises:
            TemplateRefusal: The template does not take it.
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
                messages=as_template_sees(messages),
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **tokens,
            ):
                parts.append(part)
                length += len(part)
                if length > MOST_RENDERED_CHARACTERS:
                    raise SecurityError(
                        f"the template writes more than {MOST_RENDERED_CHARACTERS:,} characters for one conversation"
                    )
        except (
            Exception
        ) as error:  # templates raise what they like, also TypeError and RecursionError
            raise TemplateRefusal(_short(error)) from error
        return "".join(parts)


@lru_cache(maxsize=16)
def compiled(text: str, where: str) -> ChatTemplate:
    """Return a template, compiled once; errors as for ``ChatTemplate``."""
    return ChatTemplate(text, where)


def _short(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return shown(words, 200)
