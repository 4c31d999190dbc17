"""Clients that wait for their texts: every event of a stream gets its time."""

import http.client
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lab.serving.dialects import Dialect, parse_event
from megatron_sorted.errors import PlatformError

ANSWER_SECONDS = 300.0
LAST_PART = 500
"""Characters of an answer that an error shows."""


@dataclass(frozen=True)
class Stream:
    """A text that a client received.

    Attributes:
        sent: Time when the request was sent.
        times: Times of the events with new text.
        text: The text.
        num_tokens: Number of new tokens, by the server's own count.
        num_cached: Number of the prompt's tokens that were not read; None if the server is silent.
    """

    sent: float
    times: Sequence[float]
    text: str
    num_tokens: int
    num_cached: int | None = None

    @property
    def first(self) -> float:
        """Return the seconds to the first token."""
        return self.times[0] - self.sent

    def pauses(self, start: float = -math.inf, end: float = math.inf) -> list[float]:
        """Return the seconds between tokens, of pauses that overlap a period."""
        return [two - one for one, two in pairwise(self.times) if two > start and one < end]

    def silences(self, start: float = -math.inf, end: float = math.inf) -> list[float]:
        """Return the seconds without news, those to the first token among them; see `pauses`."""
        return Stream(self.sent, [self.sent, *self.times], "", 0).pauses(start, end)


def ask(
    port: int,
    dialect: Dialect,
    prompt: Any,
    num_tokens: int,
    on_first: Callable[[], None] = lambda: None,
) -> Stream:
    """Send a request to a server of this machine, and read its stream.

    Args:
        port: The server's port.
        dialect: The API.
        prompt: A prompt as the dialect takes it.
        num_tokens: Number of new tokens.
        on_first: Called after the first token.

    Raises:
        PlatformError: The server refuses, or ends the stream before a token.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    body = json.dumps(dialect.body(prompt, num_tokens))
    pieces, times, sent = [], [], time.perf_counter()
    try:
        connection.request("POST", dialect.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            answer = response.read().decode("utf-8", "replace")[:LAST_PART]
            raise PlatformError(f"the server on port {port}: status {response.status}: {answer}")
        for line in response:
            now, event = time.perf_counter(), parse_event(line)
            if event is None:
                continue
            if "error" in event:
                raise PlatformError(f"the server on port {port}: {json.dumps(event)[:LAST_PART]}")
            piece = dialect.read(event)
            pieces.append(piece)
            if piece.text:
                times.append(now)
                if len(times) == 1:
                    on_first()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PlatformError(
            f"the server on port {port} did not answer ({error!r}). See its log."
        ) from error
    finally:
        connection.close()
    if not times:
        raise PlatformError(f"the server on port {port} wrote nothing. See its log.")
    counts = [piece.num_tokens for piece in pieces if piece.num_tokens is not None]
    cached = [piece.num_cached for piece in pieces if piece.num_cached is not None]
    text = dialect.text_of([piece for piece in pieces if piece.text])
    return Stream(
        sent, times, text, counts[-1] if counts else len(times), cached[-1] if cached else None
    )


def closed_loop(
    works: Sequence[Iterable[Callable[[], Stream]]], enough: Callable[[], bool] = lambda: False
) -> list[list[Stream]]:
    """Run clients at once, each of which sends its next request when the last one is complete.

    Args:
        works: The requests of each client.
        enough: Whether no further request is to be sent; each client sends at least one.

    Returns:
        The streams of each client.
    """
    start = threading.Barrier(len(works))

    def run(work: Iterable[Callable[[], Stream]]) -> list[Stream]:
        streams = []
        start.wait()
        for request in work:
            streams.append(request())
            if enough():
                break
        return streams

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, works))


def percentile(values: Iterable[float], share: float) -> float:
    """Return the least value that at least this share of the values do not exceed.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 0.5), percentile([4.0, 1.0, 3.0, 2.0], 0.95)
    (2.0, 4.0)
    """
    values = sorted(values)
    return values[max(math.ceil(share * len(values)) - 1, 0)]
