"""The forms that are no tokenizer's own: plain and alpaca, as text in training and as a chat template in use.

Both are written here side by side; a test renders the templates and compares.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sorted.text.conversation import TextSpan
from megatron_sorted.text.prompt_form import ALPACA, PLAIN, TEXT, ControlToken, PromptForm
from megatron_sorted.text.tokenizer.contract import Tokenizer

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
WITHOUT_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
# The wording is the format: models of the Alpaca family were trained on exactly this text.


@dataclass(frozen=True)
class Turn:
    """One turn: who says what; ``given`` is the input of an instruction."""

    role: str
    content: str
    given: str = ""


def write_plain(turn: Turn, opens: bool) -> str:
    """Return a turn that is no answer, each part on a line of its own."""
    return f"{turn.content}\n{turn.given}\n" if turn.given else f"{turn.content}\n"


def write_alpaca(turn: Turn, opens: bool) -> str:
    """Return a turn that is no answer; ``opens``: it is an instruction that is to be introduced."""
    if turn.role != "user":
        return f"{turn.content}\n\n"
    introduction = (WITH_INPUT if turn.given else WITHOUT_INPUT) if opens else ""
    given = f"### Input:\n{turn.given}\n\n" if turn.given else ""
    return f"{introduction}### Instruction:\n{turn.content}\n\n{given}### Response:\n"


WRITERS = {PLAIN: write_plain, ALPACA: write_alpaca}
BODIES = {
    PLAIN: "{{ message['content'] + '\\n' }}{% if message['input'] %}{{ message['input'] + '\\n' }}{% endif %}",
    ALPACA: "{% if message['role'] == 'user' %}OPENING{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% if message['input'] %}{{ '### Input:\\n' + message['input'] + '\\n\\n' }}{% endif %}{{ '### Response:\\n' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}",
}


def written_form(name: str, tokenizer: Tokenizer, opens: bool, append_eod: bool) -> PromptForm:
    """Return the plain or alpaca form for a tokenizer.

    Args:
        name: "plain" or "alpaca".
        tokenizer: Whose first and end token it has.
        opens: Whether the first instruction is introduced, as in instruction data.
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
    """Return what a tokenizer's texts begin with, if anything, and what they end with.

    A tokenizer of numbers writes its eos as a number.
    """
    begin, end = (
        None
        if number is None
        else ControlToken(tokenizer.special_tokens.get(name) or f" {number} ", number)
        for name, number in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
    )
    return begin if tokenizer.adds_bos else None, end


def written_pieces(form: PromptForm, turns: Sequence[Turn], opens: bool) -> list[TextSpan]:
    """Return the pieces of a conversation in the plain or alpaca form; turns after the last answer are left out."""
    write, end = WRITERS[form.name], form.ends[0].text if form.ends else ""
    pieces: list[TextSpan] = []
    prompt = form.begin.text if form.begin else ""
    for place, turn in enumerate(turns):
        if turn.role != "assistant":
            prompt += write(turn, opens and place == 0)
            continue
        if place == 0:
            pieces.append(TextSpan(f"{prompt}{turn.content}{end}", True, end))
        else:
            if prompt:
                pieces.append(TextSpan(prompt, False))
            pieces.append(TextSpan(f"{turn.content}{end}", True, end))
        prompt = ""
    return pieces


def _quoted(text: str) -> str:
    """Return a text as jinja reads it."""
    return json.dumps(text, ensure_ascii=False)
