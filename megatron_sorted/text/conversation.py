"""Conversations as spans of text: prompts, which are read, and answers, which are trained on.

What is trained is found by comparing outputs of the chat template, never by searching for headers.
A model is prompted with the text of the messages before an answer, with the generation prompt; the
text with the answer must begin with it; what follows, up to the token that ends the turn, is what
the model writes. A template may rewrite earlier turns (Qwen3 drops their reasoning). An answer that
the last text then shows differently from what the model wrote gets a document of its own.
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
"""Texts that occur in no template, with which a template is tested."""


class SkippedConversationError(ValueError):
    """The error of a conversation that cannot be trained on.

    Its first argument is a short reason for counting; the second gives details.
    """


@dataclass(frozen=True)
class TextSpan:
    """A span of text.

    Attributes:
        text: The text, with the names of its control tokens.
        is_response: Whether it is trained on.
        end: The control token it ends with, where the text after it can be encoded by itself; else
            empty.
    """

    text: str
    is_response: bool
    end: str = ""


@dataclass(frozen=True)
class _Answer:
    """One answer.

    Attributes:
        text: The text of the conversation up to the answer.
        begin, end: The positions where the answer begins and ends.
        trained: The (begin, end) of what is trained on.
        token: The control token that ends the answer.
    """

    text: str
    begin: int
    end: int
    trained: tuple[tuple[int, int], ...]
    token: str


class ConversationWriter:
    """A writer of conversations by the chat template of a tokenizer.

    Args:
        template: The jinja source.
        name: The template's name, for messages.
        tokenizer: The tokenizer whose control tokens end turns.

    Raises:
        DataError: The template cannot be read, fails on a simple conversation, or does not show
            which text is an answer.
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
        for messages in ([user], [{"role": "system", "content": "S"}, user]):
            try:
                prompt, text = (
                    self._render(messages, True),
                    self._render([*messages, assistant], False),
                )
                break
            except TemplateRefusal as error:
                refusals.append(str(error))
        else:
            raise DataError(
                f"{self.where}: fails on one question and one answer ({refusals[0]}). Correct the "
                "template, or use --prompt-template plain."
            )
        remedy = (
            "Correct the template, choose another (--prompt-template chat:NAME), or use "
            "--prompt-template plain."
        )
        if QUESTION not in prompt:
            raise DataError(f"{self.where}: leaves out the question. {remedy}")
        if not text.startswith(prompt):
            raise DataError(
                f"{self.where}: its text with an answer does not begin with the prompt, so it is "
                f"ambiguous what the answer is. {remedy}"
            )
        if text[len(prompt) :].count(ANSWER) != 1:
            raise DataError(
                f"{self.where}: writes an answer {text[len(prompt) :].count(ANSWER)} times. "
                f"{remedy}"
            )
        rest = text[text.rindex(ANSWER) + len(ANSWER) :]
        match = self.controls.search(rest)
        end = match.group() if match else rest.strip()
        if not end or len(tokenizer.encode_rendered(end)) != 1:
            raise DataError(
                f"{self.where}: ends an answer with {rest!r:.40}, which holds no control token of "
                f"{tokenizer.name}, so a model could not learn to stop. {remedy}"
            )
        return end, rest[rest.index(end) + len(end) :]

    def documents(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
    ) -> list[list[TextSpan]]:
        """Return the documents of a conversation, each as its spans.

        Messages after the last answer are left out.

        Raises:
            SkippedConversationError: It has no answer, or the template rejects it.
        """
        turns = [
            position
            for position, message in enumerate(messages)
            if message.get("role") == "assistant"
        ]
        if not turns:
            raise SkippedConversationError("no_assistant_turn", "")
        try:
            answers = [
                self._answer(messages[: position + 1], tools, documents) for position in turns
            ]
        except TemplateRefusal as error:
            raise SkippedConversationError("refused_by_template", str(error)) from error
        result: list[list[TextSpan]] = []
        while answers:
            text = answers[-1].text
            shown = [answer for answer in answers if text.startswith(answer.text[: answer.end])]
            result.append(_split_at_answers(text, shown))
            answers = [answer for answer in answers if answer not in shown]
        return result[::-1]

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
                "the template writes the prompt differently once there is an answer",
            )
        begin = len(prompt)
        token, end = self._end_of(text, begin)
        trained: tuple[tuple[int, int], ...] = ((begin, end),)
        if self.template.has_generation:
            marked, blocks = self.template.generation_spans(messages, self.tokens, tools, documents)
            if marked != text:
                raise SkippedConversationError("generation_block_changes_text", "")
            inside = [
                (max(first, begin), min(last, end))
                for first, last in blocks
                if last > begin and first < end
            ]
            trained = _joined([*inside, (end - len(token), end)])
        return _Answer(text, begin, end, trained, token)

    def _end_of(self, text: str, begin: int) -> tuple[str, int]:
        """Return the control token that ends an answer, and the position after it."""
        position = text.rfind(self.end, begin)
        rest = text[position + len(self.end) :]
        if position >= 0 and (rest == self.after or not rest.strip()):
            return self.end, position + len(self.end)
        matches = list(self.controls.finditer(text, begin))  # calls of tools may end differently
        if matches and not text[matches[-1].end() :].strip():
            return matches[-1].group(), matches[-1].end()
        raise SkippedConversationError(
            "no_end_of_turn", "the template ends the answer without a control token"
        )


def _joined(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return spans in order; those that touch are joined."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif end > begin:
            joined.append((begin, end))
    return tuple(joined)


def _split_at_answers(text: str, answers: Sequence[_Answer]) -> list[TextSpan]:
    """Split a text where answers begin and end."""
    spans: list[TextSpan] = []
    position = 0

    def add(end: int, is_response: bool, token: str = "") -> None:
        nonlocal position
        if end > position:
            spans.append(TextSpan(text[position:end], is_response, token))
            position = end

    for answer in answers:
        add(answer.begin, False)  # tokens may not cross the end of the prompt
        for begin, end in answer.trained:
            add(begin, False)
            add(end, True, answer.token if end == answer.end else "")
    add(len(text), False)
    return spans


def chat_form(tokenizer: Tokenizer, name: str | None) -> tuple[PromptForm, ConversationWriter]:
    """Return the form of a tokenizer's own template, and the writer that uses it.

    Args:
        tokenizer: The tokenizer with the template.
        name: The name of one of several templates; by default "default", or the only one.

    Raises:
        DataError: There is no such template, or it does not show which text is an answer.
    """
    template, chosen = chosen_template(tokenizer, name)
    writer = ConversationWriter(template, chosen, tokenizer)
    begin = None
    if tokenizer.bos_id is not None and (text_of_bos := tokenizer.special_tokens.get("bos_token")):
        text = writer.template.render([{"role": "user", "content": QUESTION}], writer.tokens, True)
        begin = (
            ControlToken(text_of_bos, tokenizer.bos_id) if text.startswith(text_of_bos) else None
        )
    return PromptForm(CHAT, template, writer.tokens, begin, (writer.end_token,), chosen), writer


def chosen_template(tokenizer: Tokenizer, name: str | None) -> tuple[str, str]:
    """Return a template of a tokenizer, and its name.

    Raises:
        DataError: There is no such template.
    """
    templates = tokenizer.chat_templates
    if not templates:
        raise DataError(
            f"--prompt-template chat: {tokenizer.name} has no chat template. Use "
            "--prompt-template plain, or give a tokenizer with chat_template.jinja or "
            "chat_template in tokenizer_config.json."
        )
    chosen = name or (
        "default"
        if "default" in templates
        else next(iter(templates))
        if len(templates) == 1
        else None
    )
    if chosen not in templates:
        label = "chat" if name is None else f"chat:{name}"
        raise DataError(
            f"--prompt-template {label}: {tokenizer.name} has the chat templates "
            f"{', '.join(sorted(templates))}. Name one of them: chat:NAME."
        )
    return templates[chosen], chosen
