"""From one JSON record to a text, turns or messages."""

import json
from dataclasses import dataclass
from typing import Any

from megatron_sorted.text.written_forms import Turn

FORMATS = ("messages", "instruction", "text")  # each also the name of the field that tells it, looked for in this order


class BrokenSampleError(ValueError):
    """A record that cannot be used; its only argument is the reason, a short name for counting."""


@dataclass(frozen=True)
class Conversation:
    """What a chat template reads."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    documents: list[Any] | None = None


def _text_field(record: dict[str, Any], name: str, default: str | None = None) -> str:
    value = default if record.get(name) is None else record[name]
    if value is None:
        raise BrokenSampleError("missing_field")
    if not isinstance(value, str):
        raise BrokenSampleError("wrong_type")
    return value


def _instruction(record: dict[str, Any]) -> tuple[str, str, str]:
    """Return instruction, input and response."""
    instruction, given, response = _text_field(record, "instruction"), _text_field(record, "input", ""), _text_field(record, "output")
    if not (instruction.strip() or given.strip()):
        raise BrokenSampleError("empty_instruction")
    if not response.strip():
        raise BrokenSampleError("empty_response")
    return instruction, given, response


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    messages = record.get("messages")
    if messages is None:
        raise BrokenSampleError("missing_field")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BrokenSampleError("wrong_type")
    return messages


def turns_of(record: Any, data_format: str) -> list[Turn]:
    """Return the turns of an instruction or a conversation, for the plain and alpaca forms.

    Raises:
        BrokenSampleError: The record has another shape, or nothing to train on.
    """
    _check_object(record)
    if data_format == "instruction":
        instruction, given, response = _instruction(record)
        return [Turn("user", instruction, given), Turn("assistant", response)]
    turns = []
    for message in _messages(record):
        role, content = _text_field(message, "role"), _text_field(message, "content", "" if "tool_calls" in message else None)
        if role not in ("system", "user", "tool", "assistant"):
            raise BrokenSampleError("unknown_role")
        if message.get("tool_calls"):
            raise BrokenSampleError("tool_calls_need_a_chat_template")
        if role == "assistant" and not content.strip():
            raise BrokenSampleError("empty_response")
        turns.append(Turn(role, content))
    if not any(turn.role == "assistant" for turn in turns):
        raise BrokenSampleError("no_assistant_turn")
    return turns


def conversation_of(record: Any, data_format: str) -> Conversation:
    """Return messages, tools and documents of a record, for a chat template.

    Raises:
        BrokenSampleError: The record has another shape, or nothing to train on.
    """
    _check_object(record)
    if data_format == "instruction":
        instruction, given, response = _instruction(record)
        question = f"{instruction}\n{given}" if given else instruction
        return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": response}])
    messages = _messages(record)
    for message in messages:
        role, content = _text_field(message, "role"), message.get("content")
        if not isinstance(content, str | list | None):
            raise BrokenSampleError("wrong_type")
        says = content.strip() if isinstance(content, str) else content
        if role == "assistant" and not says and not message.get("tool_calls"):
            raise BrokenSampleError("empty_response")
        if content is None and role != "assistant":
            raise BrokenSampleError("missing_field")
    return Conversation(messages, _listed(record, "tools"), _listed(record, "documents"))


def _listed(record: dict[str, Any], name: str) -> list[Any] | None:
    """Return a field that is a list, also one written as JSON in a text; None where it is empty."""
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BrokenSampleError("wrong_type") from error
    if value and not isinstance(value, list):
        raise BrokenSampleError("wrong_type")
    return value or None


def _check_object(record: Any) -> None:
    if not isinstance(record, dict):
        raise BrokenSampleError("not_an_object")


def text_of(record: Any) -> str:
    """Return the text of a record.

    Raises:
        BrokenSampleError: It has none.
    """
    _check_object(record)
    text = _text_field(record, "text")
    if not text.strip():
        raise BrokenSampleError("empty_text")
    return text


def detect_format(record: Any) -> str | None:
    """Return the format a record has by its fields, or None."""
    if not isinstance(record, dict):
        return None
    return next((name for name in FORMATS if name in record), None)
