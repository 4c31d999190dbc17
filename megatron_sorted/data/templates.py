"""From one JSON record to a conversation of prompts (read) and responses (trained on)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FORMATS = ("messages", "instruction", "text")  # each also the name of the field that tells it, looked for in this order


class BrokenSampleError(ValueError):
    """A record that cannot be used; its only argument is the reason, a short name for counting."""


@dataclass(frozen=True)
class Template:
    """How a prompt is spelled: of an instruction with optional input, and of one turn of a conversation."""

    instruction: Callable[[str, str], str]
    turn: Callable[[str, str], str]


def _plain(instruction: str, given: str) -> str:
    return f"{instruction}\n{given}\n" if given else f"{instruction}\n"


def _plain_turn(role: str, content: str) -> str:
    return f"{content}\n"


def _alpaca(instruction: str, given: str) -> str:
    # The wording is the format: models of the Alpaca family were trained on exactly this text.
    if given:
        return ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n")
    return ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:\n")


def _alpaca_turn(role: str, content: str) -> str:
    return f"### Instruction:\n{content}\n\n### Response:\n" if role == "user" else f"{content}\n\n"


TEMPLATES = {"plain": Template(_plain, _plain_turn), "alpaca": Template(_alpaca, _alpaca_turn)}


@dataclass(frozen=True)
class Part:
    """A run of text and whether it is trained on."""

    text: str
    is_response: bool


def _text_field(record: dict[str, Any], name: str, default: str | None = None) -> str:
    value = default if record.get(name) is None else record[name]
    if value is None:
        raise BrokenSampleError("missing_field")
    if not isinstance(value, str):
        raise BrokenSampleError("wrong_type")
    return value


def _instruction_parts(record: dict[str, Any], template: Template) -> list[Part]:
    instruction, given, response = _text_field(record, "instruction"), _text_field(record, "input", ""), _text_field(record, "output")
    if not (instruction.strip() or given.strip()):
        raise BrokenSampleError("empty_instruction")
    if not response.strip():
        raise BrokenSampleError("empty_response")
    return [Part(template.instruction(instruction, given), False), Part(response, True)]


def _message_parts(record: dict[str, Any], template: Template) -> list[Part]:
    messages = record.get("messages")
    if messages is None:
        raise BrokenSampleError("missing_field")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BrokenSampleError("wrong_type")
    parts: list[Part] = []
    prompt = ""
    for message in messages:
        role, content = _text_field(message, "role"), _text_field(message, "content")
        if role not in ("system", "user", "tool", "assistant"):
            raise BrokenSampleError("unknown_role")
        if role != "assistant":
            prompt += template.turn(role, content)
            continue
        if not content.strip():
            raise BrokenSampleError("empty_response")
        if prompt:
            parts.append(Part(prompt, False))
        parts.append(Part(content, True))
        prompt = ""
    if not parts:
        raise BrokenSampleError("no_assistant_turn")
    return parts  # a question after the last answer has no response and is dropped


def parts_of(record: Any, data_format: str, template: Template) -> list[Part]:
    """Returns prompts and responses of one record in order; a text is one response.

    Raises:
        BrokenSampleError: the record has another shape, or nothing to train on.
    """
    if not isinstance(record, dict):
        raise BrokenSampleError("not_an_object")
    if data_format == "instruction":
        return _instruction_parts(record, template)
    if data_format == "messages":
        return _message_parts(record, template)
    text = _text_field(record, "text")
    if not text.strip():
        raise BrokenSampleError("empty_text")
    return [Part(text, True)]


def detect_format(record: Any) -> str | None:
    """Returns the format a record has by its fields, or None."""
    if not isinstance(record, dict):
        return None
    return next((name for name in FORMATS if name in record), None)
