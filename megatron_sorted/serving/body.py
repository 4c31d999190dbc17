"""The body of a request: read up to a limit, parsed only when its size bounds what that costs."""

import json
import re

from fastapi import Request

from megatron_sorted.decoding.network import Network
from megatron_sorted.reading.json_text import parse_json
from megatron_sorted.reading.shown import shown
from megatron_sorted.serving.answers import RefusedError

LEAST_BODY_BYTES, MAX_BODY_BYTES = 1 << 20, 8 << 20
BYTES_PER_TOKEN = 16
"""Bytes of JSON text for one token: more than tokenizers of any language need on average."""
MAX_PROMPTS = 64
MAX_DRAINED_BYTES = 64 << 20
"""Bytes of a too large body that are read and dropped, so that its sender reads the response."""
MAX_ELEMENTS, MAX_CONTAINERS = 1 << 18, 50_000
"""Limits on a body's commas and opening brackets: parsed, one takes up to 60 and 130 bytes."""
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def max_body_bytes(network: Network) -> int:
    """Return the size limit of a body: the most prompts of a request, each filling the context."""
    return min(
        max(MAX_PROMPTS * network.max_positions * BYTES_PER_TOKEN, LEAST_BODY_BYTES), MAX_BODY_BYTES
    )


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request.

    Raises:
        RefusedError: It has more than ``max_bytes``; all of it was read, but never held.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= max_bytes:
            parts.append(part)
        else:
            parts.clear()
        if size > MAX_DRAINED_BYTES:
            break
    if size > max_bytes:
        raise RefusedError(
            f"the body has more than {max_bytes} bytes, the most that the model's context has "
            "use for. Send less.",
            status=413,
        )
    return b"".join(parts)


def parse_body(body: bytes, content_type: str) -> dict:
    """Return the JSON object in a body.

    Raises:
        RefusedError: The body holds no JSON object, or more elements than can be parsed without
            a delay for every other client.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(json|.*\+json)", media_type):
        raise RefusedError(
            f"content-type: {media_type[:80]!r} is not JSON. Send the header "
            "'content-type: application/json'."
        )
    if body.count(b",") > MAX_ELEMENTS or body.count(b"{") + body.count(b"[") > MAX_CONTAINERS:
        raise RefusedError(
            f"the body has more than {MAX_ELEMENTS} elements, or more than {MAX_CONTAINERS} "
            "lists and objects. Send less."
        )
    values = parse_json(body, "body", "Send one JSON object.", RefusedError, constants=False)
    if not isinstance(values, dict):
        raise RefusedError(
            f"body: it is a {type(values).__name__}. Send one JSON object, such as "
            '{"prompt": "Once"}.'
        )
    if HALF_PAIR.search(body):
        _check_unicode(values)
    return values


def _check_unicode(values: dict) -> None:
    """Check that all texts are Unicode.

    JSON may hold half of a UTF-16 pair, from clients that cut a text within an emoji.

    Raises:
        RefusedError: A text is not; names the field.
    """
    for name, value in values.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RefusedError(
                f"{shown(name, 80)}: it holds half of a UTF-16 pair, which is no character. "
                "Cut texts between characters.",
                name[:80],
            ) from None
