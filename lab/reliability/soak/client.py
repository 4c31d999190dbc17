"""A client of the server: requests over plain sockets, so that it can leave at any moment."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import parse_json

END = object()
LEAVES = ("half a body", "after the request", "after some text", "with unread text")
"""Moments at which a client may leave."""


@dataclass(frozen=True)
class Leave:
    """When a client leaves.

    Attributes:
        moment: One of `LEAVES`.
        seconds: Time to wait at that moment.
        num_events: Number of events of a stream to read before it.
    """

    moment: str
    seconds: float = 0.0
    num_events: int = 0


@dataclass
class Answer:
    """What a client got.

    Attributes:
        status: Status of the response; 0 without one.
        texts: The text of each choice by its index.
        ends: The reason of each choice's end.
        usage: The token counts; None without them.
        message: The message of an error.
        first_seconds, seconds: Time to the first byte of a text, and to the end.
        is_complete: Whether the response came to its end.
        reached: Whether the whole request was sent.
        headers: Headers of the response, names in lower case.
        last: The last object of the response.
    """

    status: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    message: str = ""
    first_seconds: float = 0.0
    seconds: float = 0.0
    is_complete: bool = False
    reached: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_stream(self) -> bool:
        """Return whether it was sent piece by piece."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    def add(self, event: Mapping[str, Any]) -> None:
        """Add a whole response, or an event of a stream."""
        self.last = event
        if "error" in event:
            self.message = event["error"]["message"]
        for choice in event.get("choices", ()):
            part = choice.get("delta") or choice.get("message") or choice
            text = part.get("content", part.get("text")) or ""
            self.texts[choice["index"]] = self.texts.get(choice["index"], "") + text
            if choice.get("finish_reason"):
                self.ends[choice["index"]] = choice["finish_reason"]
        self.usage = event.get("usage") or self.usage


def head_of(path: str, length: int, headers: Mapping[str, str], method: str = "POST") -> bytes:
    """Return the beginning of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: soak", "Connection: close"]
    lines += [f"Content-Length: {length}"] if method == "POST" else []
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Client:
    """Sends requests to one server, each on a connection of its own.

    Args:
        port: The server's port on this machine.
        headers: Headers of every request.
        patience: Longest time for a response in seconds.
    """

    def __init__(self, port: int, headers: Mapping[str, str] = {}, patience: float = 600.0):
        self.port, self.headers, self.patience = port, dict(headers), patience

    async def ask(
        self, path: str, body: str, is_stream: bool, leave: Leave | None = None
    ) -> Answer:
        """Send a request for texts, and read its answer until the end or until it leaves."""
        if is_stream:
            fields = {"stream": True, "stream_options": {"include_usage": True}}
            body = json.dumps(parse_json(body, "request") | fields)
        headers = {"Content-Type": "application/json", **self.headers}
        return await self.send(head_of(path, len(body.encode()), headers), body.encode(), leave)

    async def get(self, path: str) -> Answer:
        """Get a page."""
        return await self.send(head_of(path, 0, self.headers, "GET"), b"")

    async def send(self, head: bytes, body: bytes, leave: Leave | None = None) -> Answer:
        """Send bytes, and read the answer."""
        answer, began = Answer(), time.monotonic()
        try:
            await asyncio.wait_for(self._send(head, body, answer, leave), self.patience)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, DataError) as error:
            answer.message = answer.message or f"{type(error).__name__} {error}"
        answer.seconds = time.monotonic() - began
        return answer

    async def _send(self, head: bytes, body: bytes, answer: Answer, leave: Leave | None) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            await self._exchange(reader, writer, head, body, answer, leave)
        finally:
            if leave is not None and leave.moment == LEAVES[3]:
                reset_when_closed(writer.get_extra_info("socket"))
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        head: bytes,
        body: bytes,
        answer: Answer,
        leave: Leave | None,
    ) -> None:
        began, moment = time.monotonic(), leave.moment if leave else None
        half = moment == LEAVES[0]
        writer.write(head + (body[: len(body) // 2] if half else body))
        await writer.drain()
        if moment in LEAVES[:2]:
            answer.reached = not half
            await asyncio.sleep(leave.seconds)
            return
        answer.reached = True
        answer.status, answer.headers = await read_head(reader)
        num_events = 0
        if leave is not None and not leave.num_events:
            await asyncio.sleep(leave.seconds)
            return
        async for event in read_events(reader, answer.headers):
            if event is END:
                answer.is_complete = True
                return
            answer.first_seconds = answer.first_seconds or time.monotonic() - began
            answer.add(event)
            num_events += 1
            if leave is not None and num_events >= leave.num_events:
                await asyncio.sleep(leave.seconds)
                return


def reset_when_closed(connection: socket.socket) -> None:
    """Make a connection end by a reset, as that of a program that was killed with unread data."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Return the status and the headers of a response."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = (line.partition(":")[::2] for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, value in headers}


async def read_events(
    reader: asyncio.StreamReader, headers: Mapping[str, str]
) -> AsyncIterator[Any]:
    """Yield the objects of a response, then `END` if it is complete.

    A text that is not JSON comes as {"text": ...}.
    """
    if headers.get("content-type", "").startswith("text/event-stream"):
        async for event in _stream_events(reader):
            yield event
        return
    length = headers.get("content-length")
    body = await (reader.readexactly(int(length)) if length else reader.read(-1))
    is_json = headers.get("content-type", "").startswith("application/json")
    yield parse_json(body, "response") if is_json else {"text": body.decode()}
    yield END


async def _stream_events(reader: asyncio.StreamReader) -> AsyncIterator[Any]:
    """Yield the events of a stream; an error is its last event."""
    rest, has_failed = b"", False
    while size := int(await reader.readline() or b"0", 16):
        rest += await reader.readexactly(size)
        await reader.readexactly(2)
        *events, rest = rest.split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                yield END
                return
            values = parse_json(event.removeprefix(b"data: "), "event")
            has_failed |= "error" in values
            yield values
    if has_failed:
        yield END
