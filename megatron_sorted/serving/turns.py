"""A conversation as clients of OpenAI's API send it: contents of text or of parts of text, calls of tools and what they gave."""

from typing import Any

from megatron_sorted.reading.json_text import decode_json
from megatron_sorted.serving.answers import RefusedError
from megatron_sorted.serving.requests import shown

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXT_PARTS = {"text": "text", "refusal": "refusal"}


def read_messages(value: object, most_turns: int) -> list[dict[str, Any]]:
    """Return the turns as chat templates take them: "content" is a text; calls of tools are kept, their arguments as objects.

    Args:
        value: What stands in "messages".
        most_turns: A turn takes at least a token, so more of them than the context has tokens cannot fit.

    Raises:
        RefusedError: One is no turn; looks no further than the first mistake.
    """
    if not isinstance(value, list) or not value:
        raise RefusedError(
            f'messages: {shown(value)} is not a list of turns. Give [{{"role": "user", "content": "..."}}].',
            "messages",
        )
    if len(value) > most_turns:
        raise RefusedError(
            f"messages: {len(value)} turns are more than {most_turns}, the most that may fit. Send fewer.",
            "messages",
        )
    return [_turn(turn, f"messages.{place}") for place, turn in enumerate(value)]


def _turn(turn: object, field: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RefusedError(
            f'{field}: {shown(turn)} is not a turn. Give {{"role": "user", "content": "..."}}.',
            field,
        )
    role = turn.get("role")
    if role not in ROLES:
        raise RefusedError(
            f"{field}.role: {shown(role)} is not one of {', '.join(ROLES)}. Change it.",
            f"{field}.role",
        )
    calls = turn.get("tool_calls") or []
    if turn.get("content") is None and not (
        role == "assistant" and (calls or turn.get("function_call"))
    ):
        raise RefusedError(f"{field}.content: it is missing. Give a text.", f"{field}.content")
    read = {"role": role, "content": _content(turn.get("content"), f"{field}.content")}
    if calls:
        read["tool_calls"] = _calls(calls, f"{field}.tool_calls")
    return read | {
        name: turn[name] for name in ("name", "tool_call_id") if isinstance(turn.get(name), str)
    }


def _content(value: object, field: str) -> str:
    """Return a content's text, of parts one below the other."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise RefusedError(
            f"{field}: {shown(value)} is a {type(value).__name__}. Give a text, or a list of parts of text.",
            field,
        )
    texts = []
    for place, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(TEXT_PARTS[kind]) if isinstance(kind, str) and kind in TEXT_PARTS else None
        if not isinstance(text, str):
            what = (
                f"parts of type {shown(kind)} are"
                if isinstance(kind, str) and kind not in TEXT_PARTS
                else f"{shown(part)} is"
            )
            raise RefusedError(
                f'{field}.{place}: {what} not supported. Give {{"type": "text", "text": "..."}}.',
                f"{field}.{place}",
            )
        texts.append(text)
    return "\n".join(texts)


def _calls(calls: object, field: str) -> list[dict[str, Any]]:
    """Return calls of tools whose arguments are objects, as templates want them; OpenAI's are texts of JSON."""
    read = []
    for place, call in enumerate(calls if isinstance(calls, list) else [None]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RefusedError(
                f"{field}.{place}: it has no function with a name. Give it as the model's answer had it.",
                f"{field}.{place}",
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = decode_json((arguments or "{}").encode())
            except ValueError:
                raise RefusedError(
                    f"{field}.{place}.function.arguments: not JSON. Give it as the model's answer had it.",
                    f"{field}.{place}.function.arguments",
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
