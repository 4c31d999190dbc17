"""A record of each request: its id, its owner and what it used; one line of log when it ends."""

import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_sorted.serving.usage import Usage

LOG = logging.getLogger("megatron_sorted.requests")
ID_HEADER = b"x-request-id"
VALID_ID = re.compile(rb"[!-~]{1,128}")
"""An id that a client may choose: it stands in headers and, unquoted, in lines of logs."""
UNLOGGED_PATHS = ("/health", "/metrics")
"""Paths that are asked every few seconds, and logged only when they fail."""
MAX_PATH = 200


@dataclass
class RequestRecord:
    """One request, from its headers to the end of its response.

    Attributes:
        id: The client's name for the request, else a new one.
        method, path: As received; the path is percent-encoded again.
        began_at, ended_at: Times by ``clock``.
        owner: Owner of the API key; "" without keys.
        status: The response's status; 0 before it.
        is_complete: Whether the response was sent to its end.
        has_left: Whether the client left before it.
        usage: What its texts used; None for requests of no text.
        clock: Returns the time in seconds.
    """

    id: str
    method: str
    path: str
    clock: Callable[[], float] = time.monotonic
    began_at: float = field(init=False)
    ended_at: float = 0.0
    owner: str = ""
    status: int = 0
    is_complete: bool = False
    has_left: bool = False
    usage: Usage | None = None

    def __post_init__(self) -> None:
        """Note the time."""
        self.began_at = self.clock()

    @property
    def seconds(self) -> float:
        """Return the time that the request took."""
        return self.ended_at - self.began_at

    @property
    def seconds_to_first_token(self) -> float | None:
        """Return the time to the first new token; None without one."""
        first_at = self.usage and self.usage.first_at
        return None if first_at is None else first_at - self.began_at

    def line(self) -> str:
        """Return the line of the log, without any text of a prompt or a key."""
        fields = {
            "id": self.id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "end": "complete" if self.is_complete and not self.has_left else "disconnected",
            "key": self.owner or "-",
        }
        if self.usage is not None:
            fields |= {
                "end": self.usage.error or fields["end"],
                "prompt": self.usage.prompt_tokens,
                "new": self.usage.tokens,
                "cached": self.usage.cached_tokens,
            }
            if (first := self.seconds_to_first_token) is not None:
                fields["first"] = f"{first:.3f}"
        fields["seconds"] = f"{self.seconds:.3f}"
        return " ".join(f"{name}={value}" for name, value in fields.items())


class RecordRequests:
    """An ASGI application around another one, which finds a request's record in its state.

    Args:
        app: The application.
        ended: Called with each record when its request has ended.
    """

    def __init__(self, app: ASGIApp, ended: Callable[[RequestRecord], None]):
        self.app, self.ended = app, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, with its id in the response's headers."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == ID_HEADER), b"")
        record = RequestRecord(
            given.decode() if VALID_ID.fullmatch(given) else uuid.uuid4().hex,
            scope["method"],
            quote(scope["path"], errors="replace")[:MAX_PATH],
        )
        scope.setdefault("state", {})["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = [*message.get("headers", ()), (ID_HEADER, record.id.encode())]
                message = {**message, "headers": headers}
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                record.is_complete = True

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            record.status = record.status or 500  # the framework's answer to a fault
            raise
        finally:
            record.ended_at = record.clock()
            self.ended(record)


def log_request(record: RequestRecord) -> None:
    """Log a request that has ended."""
    if record.path not in UNLOGGED_PATHS or record.status != 200:
        LOG.info(record.line())


def write_request_log() -> None:
    """Write the log to standard error, with times in UTC."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
