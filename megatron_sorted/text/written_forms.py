"""The forms plain and alpaca, which belong to no tokenizer: as text and as a chat template.

Training uses the text, a model in use the template. Both stand here side by side; a test renders
the templates and compares.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sorted.text.conversation import TextSpan
from megatron_sorted.text.prompt_form import ALPACA, PLAIN, TEXT, ControlToken, PromptForm
from megatron_sorted.text.tokenizer.contract import Tokenizer

# The wording is the format: models of the Alpaca family were trained on exactly this text.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; ``given`` is the input of an instruction."""

    role: str
    content: str
    given: str = ""


def write_plain(turn: Turn, opens: bool) -> str:
    """Return a turn that is not an answer, each part on a line of its own."""
    return f"{turn.content}\n{turn.given}\n" if turn.given else f"{turn.content}\n"


def write_alpaca(turn: Turn, opens: bool) -> str:
    """Return a turn that is not an answer; ``opens``: with the introduction of an instruction."""
    if turn.role != "user":
        return f"{turn.content}\n\n"
    introduction = (WITH_INPUT if turn.given else WITHOUT_INPUT) if opens else ""
    given = f"### Input:\n{turn.given}\n\n" if turn.given else ""
    return f"{introduction}### Instruction:\n{turn.content}\n\n{given}### Response:\n"


WRITERS = {PLAIN: write_plain, ALPACA: write_alpaca}
BODIES = {
    PLAIN: (
        "{{ message['content'] + '\\n' }}{% if message['input'] %}{{ message['input'] + '\\n' "
        "}}{% endif %}"
    ),
    ALPACA: (
        "{% if message['role'] == 'user' %}OPENING{{ '### Instruction:\\n' + message['content'] + "
        "'\\n\\n' }}{% if message['input'] %}{{ '### Input:\\n' + message['input'] + '\\n\\n' "
        "}}{% endif %}{{ '### Response:\\n' }}{% else %}{{ message['content'] + '\\n\\n' }}{% "
        "endif %}"
    ),
}


def written_form(name: str, tokenizer: Tokenizer, opens: bool, append_eod: bool) -> PromptForm:
    """Return the plain or alpaca form for a tokenizer.

    Args:
        name: "plain" or "alpaca".
        tokenizer: The tokenizer with the first and end token.
        opens: Whether the first instruction has an introduction, as in instruction data.
        append_eod: Whether answers end with eos.
    """
    begin, end = outer_tokens(tokenizer)
    ends = (end,) if append_eod and end is not None else ()
    opening = (
        "{% if loop.first %}{{ "
        + _quoted(WITH_INPUT)
        + " if message['input'] else "
        + _quoted(WITHOUT_INPUT)
        + " }}{% endif %}"
        if opens
        else ""
    )
    template = ("{{ " + _quoted(begin.text) + " }}" if begin else "") + (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content']"
        + (" + " + _quoted(end.text) if ends else "")
        + " }}{% else %}"
        + BODIES[name].replace("OPENING", opening)
        + "{% endif %}{% endfor %}"
    )
    return PromptForm(name, template, dict(tokenizer.special_tokens), begin, ends)


def text_form(tokenizer: Tokenizer, append_eod: bool) -> PromptForm:
    """Return the form of documents: no conversation, but a first and an end token."""
    begin, end = outer_tokens(tokenizer)
    return PromptForm(
        TEXT,
        "",
        dict(tokenizer.special_tokens),
        begin,
        (end,) if append_eod and end is not None else (),
    )


def outer_tokens(tokenizer: Tokenizer) -> tuple[ControlToken | None, ControlToken | None]:
    """Return the token that a tokenizer's texts begin with, if any, and the one they end with.

    A tokenizer of numbers writes its eos as a number.
    """
    begin, end = (
        None
        if number is None
        else ControlToken(tokenizer.special_tokens.get(name) or f" {number} ", number)
        for name, number in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
    )
    return begin if tokenizer.adds_bos else None, end


def written_spans(form: PromptForm, turns: Sequence[Turn], opens: bool) -> list[TextSpan]:
    """Return the spans of a conversation in the plain or alpaca form.

    Turns after the last answer are left out.
    """
    write, end = WRITERS[form.name], form.ends[0].text if form.ends else ""
    spans: list[TextSpan] = []
    prompt = form.begin.text if form.begin else ""
    for position, turn in enumerate(turns):
        if turn.role != "assistant":
            prompt += write(turn, opens and position == 0)
            continue
        if position == 0:
            spans.append(TextSpan(f"{prompt}{turn.content}{end}", True, end))
        else:
            if prompt:
                spans.append(TextSpan(prompt, False))
            spans.append(TextSpan(f"{turn.content}{end}", True, end))
        prompt = ""
    return spans


def _quoted(text: str) -> str:
    """Return a text as a jinja literal."""
    return json.dumps(text, ensure_ascii=False)
