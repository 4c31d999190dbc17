"""The link between clients and the worker: outputs awaited without a thread, clients that leave."""

import asyncio
import queue
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from fastapi import Request

from megatron_sorted.decoding.text_generator import StreamedText
from megatron_sorted.serving.job import Job
from megatron_sorted.serving.token_logprobs import TokenScore


def outputs_of(
    job: Job, observe: Callable[[object], None] = lambda _: None
) -> AsyncIterator[StreamedText | list[list[TokenScore]]]:
    """Return the outputs of a job that is not submitted yet.

    The job is cancelled when the iterator is closed, or dropped before its first use.

    Args:
        job: The job.
        observe: Called with each output, also an error, before the output is yielded or raised.
    """
    ready, loop = asyncio.Event(), asyncio.get_running_loop()

    def notify() -> None:
        with suppress(RuntimeError):  # the loop is closed: no client listens
            loop.call_soon_threadsafe(ready.set)

    job.notify = notify
    outputs = _listen(job, ready, observe)
    weakref.finalize(outputs, job.cancel).atexit = False
    return outputs


async def _listen(
    job: Job, ready: asyncio.Event, observe: Callable[[object], None]
) -> AsyncIterator[StreamedText | list[list[TokenScore]]]:
    """Yield a job's outputs as they come; waiting for them takes no thread."""
    try:
        while True:
            ready.clear()
            try:
                output = job.outputs.get_nowait()
            except queue.Empty:
                await ready.wait()
                continue
            if output is None:
                return
            observe(output)
            if isinstance(output, BaseException):
                raise output
            yield output
    finally:
        job.cancel()


async def cancel_on_disconnect(request: Request, job: Job) -> None:
    """Cancel a job when its client disconnects, also while the job waits in the queue."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()
