"""Between clients and the worker: pieces that are waited for without a thread, clients that leave, bodies that are too large."""

import asyncio
import queue
import weakref
from collections.abc import AsyncIterator
from contextlib import suppress

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_sorted.decoding.writer import Piece

from .worker import Job

MOST_BODY_BYTES = 16 << 20
"""Of a request: larger ones are refused while they come."""


def pieces_of(job: Job) -> AsyncIterator[Piece]:
    """Returns the pieces of a job that is not submitted yet; the job ends when nobody listens any more, or nobody ever did."""
    ready, loop = asyncio.Event(), asyncio.get_running_loop()

    def told() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(ready.set)

    job.told = told
    pieces = _listen(job, ready)
    weakref.finalize(pieces, job.gone.set).atexit = False
    return pieces


async def _listen(job: Job, ready: asyncio.Event) -> AsyncIterator[Piece]:
    """Yields a job's pieces as they come; however many wait, none takes a thread."""
    try:
        while True:
            ready.clear()
            try:
                found = job.pieces.get_nowait()
            except queue.Empty:
                await ready.wait()
                continue
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        job.gone.set()


async def until_gone(request: Request, job: Job) -> None:
    """Ends a job when its client leaves, also while it waits in line."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.gone.set()


class BoundedBody:
    """Refuses requests whose body is larger than `MOST_BODY_BYTES`, before all of it is in memory.

    Args:
        app: What answers the others.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts what comes."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_BODY_BYTES:
                raise HTTPException(413, f"the body has more than {MOST_BODY_BYTES} bytes; send less")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)
