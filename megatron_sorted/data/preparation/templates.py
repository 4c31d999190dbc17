"""One JSON record as a text, turns or messages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.reading.json_lines import first_record, promises_json
from megatron_sorted.reading.json_text import decode_json
from megatron_sorted.text.written_forms import Turn

FORMATS = ("messages", "instruction", "text")
"""The formats, each also the name of the field that shows it, in the order in which they are
tested.
"""


class BrokenSampleError(ValueError):
    """A record that cannot be used; its only argument is the reason, a short name for counting."""


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template."""

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
    instruction, given, response = (
        _text_field(record, "instruction"),
        _text_field(record, "input", ""),
        _text_field(record, "output"),
    )
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
    return [_without_nulls(message) for message in messages]


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without fields that are null.

    The arguments of tool calls are kept as they are, since a null may be intended there.
    """
    kept = {name: value for name, value in message.items() if value is not None}
    if isinstance(calls := kept.get("tool_calls"), list):
        kept["tool_calls"] = [
            _without_nulls(call) | _function_of(call) if isinstance(call, dict) else call
            for call in calls
        ]
    return kept


def _function_of(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        return {}
    return {
        "function": {
            name: value
            for name, value in function.items()
            if value is not None or name == "arguments"
        }
    }


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
        role, content = (
            _text_field(message, "role"),
            _text_field(message, "content", "" if message.get("tool_calls") else None),
        )
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
        return Conversation(
            [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
        )
    messages = _messages(record)
    for message in messages:
        role, content = _text_field(message, "role"), message.get("content")
        if not isinstance(content, str | list | None):
            raise BrokenSampleError("wrong_type")
        text = content.strip() if isinstance(content, str) else content
        if role == "assistant" and not text and not message.get("tool_calls"):
            raise BrokenSampleError("empty_response")
        if content is None and role != "assistant":
            raise BrokenSampleError("missing_field")
    messages = [
        message if "content" in message else {**message, "content": ""} for message in messages
    ]
    return Conversation(messages, _listed(record, "tools"), _listed(record, "documents"))


def _listed(record: dict[str, Any], name: str) -> list[Any] | None:
    """Return a field that is a list, or JSON of a list in a text; None if it is empty."""
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = decode_json(value.encode())
        except ValueError as error:
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
    """Return the format a record has by its fields, or None; fields that are null do not count.

    >>> detect_format({"text": None, "messages": []})
    'messages'
    """
    if not isinstance(record, dict):
        return None
    return next((name for name in FORMATS if record.get(name) is not None), None)


def format_of_row(record: Any, data_format: str) -> str:
    """Return the format of one row of a file.

    It is that of the file, or the other format of a conversation if the row has that alone.
    """
    if isinstance(record, dict) and record.get(data_format) is None and data_format != "text":
        row_format = detect_format(record)
        return data_format if row_format in (None, "text") else row_format
    return data_format


def holds_records(path: Path) -> bool:
    """Return whether a file holds JSON lines or records instead of plain text.

    Its name, or the fields of its first record, decide.
    """
    return promises_json(path) or detect_format(first_record(path)) is not None
