"""From one conversation to pieces of text: prompts (read) and answers (trained on), as a chat template writes them.

What is trained is found by comparing what the template writes, never by looking for headers. The text of the messages before an
answer, with the generation prompt, is what a model is asked with; the text with the answer has to begin with it; what follows, up to
the token that ends the turn, is what the model writes. A template may rewrite earlier turns (Qwen3 drops their reasoning). Then an
answer that the last text shows otherwise than it was to be written gets a document of its own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sorted.errors import DataError
from megatron_sorted.text.chat_template import TemplateRefusal, compiled
from megatron_sorted.text.prompt_form import CHAT, ControlToken, PromptForm
from megatron_sorted.text.tokenizer.contract import Tokenizer

QUESTION, ANSWER = "Qv7question", "Wk3answer"
"""Words of no template, with which a template is tried."""


class SkippedConversationError(ValueError):
    """A conversation that cannot be trained; its first argument is a short reason for counting, the second says more."""


@dataclass(frozen=True)
class TextSpan:
    """A run of text.

    Attributes:
        text: With the names of its control tokens.
        is_response: Whether it is trained on.
        end: The control token that it ends with, where text after it is read by itself; else empty.
    """

    text: str
    is_response: bool
    end: str = ""


@dataclass(frozen=True)
class _Answer:
    """One answer: the text with it, where it begins and ends, what of it is trained, and its end token."""

    text: str
    begin: int
    end: int
    spans: tuple[tuple[int, int], ...]
    token: str


class Conversations:
    """Writes conversations by a tokenizer's chat template.

    Args:
        template: Jinja.
        name: Of the template, for messages.
        tokenizer: Whose control tokens end turns.

    Raises:
        DataError: The template cannot be read, fails on a simple conversation, or does not let the answers be found.
    """

    def __init__(self, template: str, name: str, tokenizer: Tokenizer):
        self.where = f"chat template {name!r} of {tokenizer.name}"
        self.template, self.tokens = compiled(template, self.where), dict(tokenizer.special_tokens)
        names = sorted(
            filter(None, map(tokenizer.token_text, tokenizer.special_ids)), key=len, reverse=True
        )
        self.controls = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self.end, self.after = self._try(tokenizer)
        [number] = tokenizer.encode_rendered(self.end)
        self.end_token = ControlToken(self.end, number)

    def _try(self, tokenizer: Tokenizer) -> tuple[str, str]:
        """Return the token that ends an answer, and what the template writes after it."""
        user, assistant = (
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        )
        refusals = []
        for before in ([user], [{"role": "system", "content": "S"}, user]):
            try:
                prompt, text = self._render(before, True), self._render([*before, assistant], False)
                break
            except TemplateRefusal as error:
                refusals.append(str(error))
        else:
            raise DataError(
                f"{self.where}: fails on one question and one answer ({refusals[0]}). Mend the template, or use "
                "--prompt-template plain."
            )
        remedy = "Mend the template, choose another (--prompt-template chat:NAME), or use --prompt-template plain."
        if QUESTION not in prompt:
            raise DataError(f"{self.where}: leaves the question out of what it writes. {remedy}")
        if not text.startswith(prompt):
            raise DataError(
                f"{self.where}: what it writes with an answer does not begin with what it asks the model with, so the answer "
                f"cannot be found without guessing. {remedy}"
            )
        if text[len(prompt) :].count(ANSWER) != 1:
            raise DataError(
                f"{self.where}: writes an answer {text[len(prompt) :].count(ANSWER)} times. {remedy}"
            )
        rest = text[text.rindex(ANSWER) + len(ANSWER) :]
        found = self.controls.search(rest)
        end = found.group() if found else rest.strip()
        if not end or len(tokenizer.encode_rendered(end)) != 1:
            raise DataError(
                f"{self.where}: ends an answer with {rest!r:.40}, which holds no control token of {tokenizer.name}, so a model "
                f"could not learn to stop. {remedy}"
            )
        return end, rest[rest.index(end) + len(end) :]

    def documents(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
    ) -> list[list[TextSpan]]:
        """Return the documents of a conversation, each as its pieces; messages after the last answer are left out.

        Raises:
            SkippedConversationError: It has no answer, or the template does not take it.
        """
        turns = [
            place for place, message in enumerate(messages) if message.get("role") == "assistant"
        ]
        if not turns:
            raise SkippedConversationError("no_assistant_turn", "")
        try:
            answers = [self._answer(messages[: place + 1], tools, documents) for place in turns]
        except TemplateRefusal as error:
            raise SkippedConversationError("refused_by_template", str(error)) from error
        found: list[list[TextSpan]] = []
        while answers:
            text = answers[-1].text
            shown = [answer for answer in answers if text.startswith(answer.text[: answer.end])]
            found.append(_pieces(text, shown))
            answers = [answer for answer in answers if answer not in shown]
        return found[::-1]

    def _render(self, messages, add_generation_prompt: bool, tools=None, documents=None) -> str:
        return self.template.render(messages, self.tokens, add_generation_prompt, tools, documents)

    def _answer(self, messages, tools, documents) -> _Answer:
        prompt, text = (
            self._render(messages[:-1], True, tools, documents),
            self._render(messages, False, tools, documents),
        )
        if not text.startswith(prompt):
            raise SkippedConversationError(
                "answer_not_after_prompt",
                "the template writes the prompt otherwise once there is an answer",
            )
        begin = len(prompt)
        token, end = self._end_of(text, begin)
        spans: tuple[tuple[int, int], ...] = ((begin, end),)
        if self.template.has_generation:
            marked, tagged = self.template.generation_spans(messages, self.tokens, tools, documents)
            if marked != text:
                raise SkippedConversationError("generation_block_changes_text", "")
            inside = [
                (max(first, begin), min(last, end))
                for first, last in tagged
                if last > begin and first < end
            ]
            spans = _joined([*inside, (end - len(token), end)])
        return _Answer(text, begin, end, spans, token)

    def _end_of(self, text: str, begin: int) -> tuple[str, int]:
        """Return the control token that ends an answer, and the place behind it."""
        place = text.rfind(self.end, begin)
        rest = text[place + len(self.end) :]
        if place >= 0 and (rest == self.after or not rest.strip()):
            return self.end, place + len(self.end)
        found = list(self.controls.finditer(text, begin))  # calls of tools may end otherwise
        if found and not text[found[-1].end() :].strip():
            return found[-1].group(), found[-1].end()
        raise SkippedConversationError(
            "no_end_of_turn", "the template ends the answer without a control token"
        )


def _joined(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return spans in order, those that touch made one."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif end > begin:
            found.append((begin, end))
    return tuple(found)


def _pieces(text: str, answers: Sequence[_Answer]) -> list[TextSpan]:
    """Return a text cut where answers begin and end."""
    pieces: list[TextSpan] = []
    place = 0

    def add(end: int, is_response: bool, token: str = "") -> None:
        nonlocal place
        if end > place:
            pieces.append(TextSpan(text[place:end], is_response, token))
            place = end

    for answer in answers:
        add(answer.begin, False)  # where a model is asked: a border of tokens
        for begin, end in answer.spans:
            add(begin, False)
            add(end, True, answer.token if end == answer.end else "")
    add(len(text), False)
    return pieces


def chat_form(tokenizer: Tokenizer, name: str | None) -> tuple[PromptForm, Conversations]:
    """Return the form of a tokenizer's own template, and what writes by it.

    Args:
        tokenizer: Whose template.
        name: Of several templates, which; by default "default", or the only one.

    Raises:
        DataError: There is no such template, or answers cannot be found in what it writes.
    """
    template, chosen = chosen_template(tokenizer, name)
    writer = Conversations(template, chosen, tokenizer)
    begin = None
    if tokenizer.bos_id is not None and (word := tokenizer.special_tokens.get("bos_token")):
        text = writer.template.render([{"role": "user", "content": QUESTION}], writer.tokens, True)
        begin = ControlToken(word, tokenizer.bos_id) if text.startswith(word) else None
    return PromptForm(CHAT, template, writer.tokens, begin, (writer.end_token,), chosen), writer


def chosen_template(tokenizer: Tokenizer, name: str | None) -> tuple[str, str]:
    """Return a template of a tokenizer, and its name.

    Raises:
        DataError: There is no such template.
    """
    templates = tokenizer.chat_templates
    if not templates:
        raise DataError(
            f"--prompt-template chat: {tokenizer.name} has no chat template. Use --prompt-template plain, or give a tokenizer "
            "with chat_template.jinja or chat_template in tokenizer_config.json."
        )
    chosen = name or (
        "default"
        if "default" in templates
        else next(iter(templates))
        if len(templates) == 1
        else None
    )
    if chosen not in templates:
        asked = "chat" if name is None else f"chat:{name}"
        raise DataError(
            f"--prompt-template {asked}: {tokenizer.name} has the chat templates {', '.join(sorted(templates))}. "
            "Name one of them: chat:NAME."
        )
    return templates[chosen], chosen
