"""Between clients and the worker: pieces that are waited for without a thread, and clients that leave."""

import asyncio
import queue
import weakref
from collections.abc import AsyncIterator
from contextlib import suppress

from fastapi import Request

from megatron_sorted.decoding.text_generator import StreamedText
from megatron_sorted.serving.token_logprobs import TokenScore
from megatron_sorted.serving.worker import Job


def pieces_of(job: Job) -> AsyncIterator[StreamedText | list[list[TokenScore]]]:
    """Return the pieces of a job that is not submitted yet; the job ends when nobody listens any more, or nobody ever did."""
    ready, loop = asyncio.Event(), asyncio.get_running_loop()

    def told() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(ready.set)

    job.told = told
    pieces = _listen(job, ready)
    weakref.finalize(pieces, job.leave).atexit = False
    return pieces


async def _listen(
    job: Job, ready: asyncio.Event
) -> AsyncIterator[StreamedText | list[list[TokenScore]]]:
    """Yield a job's pieces as they come; however many wait, none takes a thread."""
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
        job.leave()


async def until_gone(request: Request, job: Job) -> None:
    """End a job when its client leaves, also while it waits in line."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.leave()
