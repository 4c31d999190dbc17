"""A request's body: read up to a limit, parsed only when its size bounds what that costs."""

import json
import re

from fastapi import Request

from megatron_sorted.decoding.network import Network
from megatron_sorted.reading.json_text import parse_json
from megatron_sorted.reading.shown import shown
from megatron_sorted.serving.answers import RefusedError

LEAST_BODY_BYTES, MOST_BODY_BYTES = 1 << 20, 8 << 20
BYTES_PER_TOKEN = 16
"""Of text in JSON, more than tokenizers of any language need on average."""
MOST_PROMPTS = 64
MOST_DRAINED_BYTES = 64 << 20
"""Of a body that is too large: read and dropped, so that its sender gets to read the answer."""
MOST_ELEMENTS, MOST_CONTAINERS = 1 << 18, 50_000
"""Of a body's JSON: commas, and brackets that open. An element takes up to 60 bytes and a container 130 once parsed."""
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def most_body_bytes(network: Network) -> int:
    """Return the limit of a body: room for as many prompts as a request may have, each filling the context."""
    return min(
        max(MOST_PROMPTS * network.max_positions * BYTES_PER_TOKEN, LEAST_BODY_BYTES),
        MOST_BODY_BYTES,
    )


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Return the body.

    Raises:
        RefusedError: It has more than ``most_bytes``; all of it was read, but never held.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most_bytes:
            parts.append(part)
        else:
            parts.clear()
        if size > MOST_DRAINED_BYTES:
            break
    if size > most_bytes:
        raise RefusedError(
            f"the body has more than {most_bytes} bytes, the most that the model's context has use for. Send less.",
            status=413,
        )
    return b"".join(parts)


def parse_body(body: bytes, content_type: str) -> dict:
    """Return the JSON object in a body.

    Raises:
        RefusedError: It is none, or has so many elements that parsing it would cost everybody.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise RefusedError(
            f"content-type: {kind[:80]!r} is not JSON. Send the header 'content-type: application/json'."
        )
    if body.count(b",") > MOST_ELEMENTS or body.count(b"{") + body.count(b"[") > MOST_CONTAINERS:
        raise RefusedError(
            f"the body has more than {MOST_ELEMENTS} elements, or more than {MOST_CONTAINERS} lists and objects. Send less."
        )
    values = parse_json(body, "body", "Send one JSON object.", RefusedError, constants=False)
    if not isinstance(values, dict):
        raise RefusedError(
            f'body: it is a {type(values).__name__}. Send one JSON object, such as {{"prompt": "Once"}}.'
        )
    if HALF_PAIR.search(body):
        _check_text(values)
    return values


def _check_text(values: dict) -> None:
    """Check that all texts are Unicode: JSON may hold half a UTF-16 pair, of clients that cut a text within an emoji.

    Raises:
        RefusedError: One is not; names the field.
    """
    for name, value in values.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RefusedError(
                f"{shown(name, 80)}: it holds half of a UTF-16 pair, which is no character. Cut texts between characters.",
                name[:80],
            ) from None
