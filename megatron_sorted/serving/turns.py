"""The messages of a chat request: contents as text or parts of text, tool calls and results."""

from typing import Any

from megatron_sorted.reading.json_text import decode_json
from megatron_sorted.serving.answers import RefusedError
from megatron_sorted.serving.requests import excerpt

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXT_PARTS = {"text": "text", "refusal": "refusal"}


def read_messages(value: object, most_turns: int) -> list[dict[str, Any]]:
    """Return the turns in the form of chat templates: contents are texts, arguments are objects.

    Args:
        value: The request's field "messages".
        most_turns: The largest number of turns; each takes at least a token of the context.

    Raises:
        RefusedError: An element is not a turn; names the first such element.
    """
    if not isinstance(value, list) or not value:
        raise RefusedError(
            f"messages: {excerpt(value)} is not a list of turns. "
            'Give [{"role": "user", "content": "..."}].',
            "messages",
        )
    if len(value) > most_turns:
        raise RefusedError(
            f"messages: {len(value)} turns are more than {most_turns}, the most that may fit. "
            "Send fewer.",
            "messages",
        )
    return [_read_turn(turn, f"messages.{index}") for index, turn in enumerate(value)]


def _read_turn(turn: object, field: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RefusedError(
            f'{field}: {excerpt(turn)} is not a turn. Give {{"role": "user", "content": "..."}}.',
            field,
        )
    role = turn.get("role")
    if role not in ROLES:
        raise RefusedError(
            f"{field}.role: {excerpt(role)} is not one of {', '.join(ROLES)}. Change it.",
            f"{field}.role",
        )
    calls = turn.get("tool_calls") or []
    if turn.get("content") is None and not (
        role == "assistant" and (calls or turn.get("function_call"))
    ):
        raise RefusedError(f"{field}.content: it is missing. Give a text.", f"{field}.content")
    read = {"role": role, "content": _read_content(turn.get("content"), f"{field}.content")}
    if calls:
        read["tool_calls"] = _read_calls(calls, f"{field}.tool_calls")
    return read | {
        name: turn[name] for name in ("name", "tool_call_id") if isinstance(turn.get(name), str)
    }


def _read_content(value: object, field: str) -> str:
    """Return the text of a turn's content; parts are joined by newlines."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise RefusedError(
            f"{field}: {excerpt(value)} is a {type(value).__name__}. "
            "Give a text, or a list of parts of text.",
            field,
        )
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(TEXT_PARTS[kind]) if isinstance(kind, str) and kind in TEXT_PARTS else None
        if not isinstance(text, str):
            what = (
                f"parts of type {excerpt(kind)} are"
                if isinstance(kind, str) and kind not in TEXT_PARTS
                else f"{excerpt(part)} is"
            )
            raise RefusedError(
                f'{field}.{index}: {what} not supported. Give {{"type": "text", "text": "..."}}.',
                f"{field}.{index}",
            )
        texts.append(text)
    return "\n".join(texts)


def _read_calls(calls: object, field: str) -> list[dict[str, Any]]:
    """Return tool calls with arguments as objects for chat templates; OpenAI's are JSON texts."""
    read = []
    for index, call in enumerate(calls if isinstance(calls, list) else [None]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RefusedError(
                f"{field}.{index}: it has no function with a name. "
                "Give it as the model's answer had it.",
                f"{field}.{index}",
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = decode_json((arguments or "{}").encode())
            except ValueError:
                raise RefusedError(
                    f"{field}.{index}.function.arguments: not JSON. "
                    "Give it as the model's answer had it.",
                    f"{field}.{index}.function.arguments",
                ) from None
        read.append(
            {
                **{name: call[name] for name in ("id", "type") if isinstance(call.get(name), str)},
                "function": {
                    "name": function["name"],
                    "arguments": arguments if arguments is not None else {},
                },
            }
        )
    return read
