"""The three parts: many clients, a long prompt among streams, and turns of a conversation."""

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lab.contests.rounds import Row, digest, rounded
from lab.serving.clients import Stream, ask, closed_loop, percentile
from lab.serving.contenders import Contender
from lab.serving.dialects import Chat, Prompt
from lab.serving.servers import Server

THROUGHPUT, LONG_PROMPT, PREFIXES = "throughput", "long prompt", "prefixes"
"""Names of the parts."""


@dataclass(frozen=True)
class Size:
    """How much is written.

    Attributes:
        num_tokens: Number of new tokens of each text.
        texts: Largest number of texts of a turn, at least one for each client.
        seconds: Time after which no further text is begun.
        streams: Number of texts among which the long prompt arrives.
        turns: Number of turns of the conversation.
        after_long: Number of new tokens after the long prompt.
    """

    num_tokens: int = 64
    texts: int = 32
    seconds: float = 10.0
    streams: int = 8
    turns: int = 10
    after_long: int = 8


def alone(contender: Contender, server: Server, prompts: Sequence[Prompt], size: Size) -> list[str]:
    """Return digests of the texts that are written one after another."""
    return [
        digest([ask(server.port, contender.dialect, one, size.num_tokens).text]) for one in prompts
    ]


def with_clients(
    contender: Contender,
    server: Server,
    prompts: Sequence[Prompt],
    size: Size,
    clients: int,
    references: Sequence[str],
) -> Row:
    """Return the row of clients that ask at once, each again when its text is complete.

    Args:
        contender: Whose server it is.
        server: The server.
        prompts: All prompts.
        size: How much is written.
        clients: Number of clients.
        references: Digests of the texts that these prompts get alone.
    """
    each = max(size.texts // clients, 1)
    places = [[(one + clients * turn) % len(prompts) for turn in range(each)]
              for one in range(clients)]  # fmt: skip
    ports = server.port, contender.dialect
    end = time.monotonic() + size.seconds
    load, used, began = os.getloadavg()[0], server.cpu_seconds(), time.perf_counter()
    streams = closed_loop(
        [
            [lambda place=place: ask(*ports, prompts[place], size.num_tokens) for place in mine]
            for mine in places
        ],
        lambda: time.monotonic() > end,
    )
    seconds, used = time.perf_counter() - began, server.cpu_seconds() - used
    whole = list(itertools.chain(*streams))
    pairs = [
        (stream, references[place])
        for mine, own in zip(places, streams, strict=True)
        for place, stream in zip(mine, own, strict=False)
    ]
    return {
        **_row(THROUGHPUT, clients, contender, whole, load),
        "seconds": rounded(seconds), "cpu_seconds": rounded(used),
        "same": sum(digest([stream.text]) == reference for stream, reference in pairs),
        "short": sum(stream.num_tokens < size.num_tokens for stream in whole),
    }  # fmt: skip


def with_long_prompt(
    contender: Contender, server: Server, prompts: Sequence[Prompt], size: Size, long: Prompt
) -> Row:
    """Return the row of a long prompt that comes when every other client has received a token.

    Pauses and silences are those that overlap the time from its request to its last token.
    """
    ports, load = (server.port, contender.dialect), os.getloadavg()[0]
    started, ended = threading.Semaphore(0), threading.Event()

    def stream_of(place: int) -> Sequence[Callable[[], Stream]]:
        prompt = prompts[place % len(prompts)]
        yield lambda: ask(*ports, prompt, size.num_tokens, started.release)
        while True:
            yield lambda: ask(*ports, prompt, size.num_tokens)

    def long_one() -> Sequence[Callable[[], Stream]]:
        def request() -> Stream:
            try:
                for _ in range(size.streams):
                    if not started.acquire(timeout=120):  # a stream has failed, and says so
                        break
                return ask(*ports, long, size.after_long)
            finally:
                ended.set()

        yield request

    used, began = server.cpu_seconds(), time.perf_counter()
    *streams, [long_stream] = closed_loop(
        [*(stream_of(place) for place in range(size.streams)), long_one()], ended.is_set
    )
    seconds, used = time.perf_counter() - began, server.cpu_seconds() - used
    whole = list(itertools.chain(*streams))
    period = long_stream.sent, long_stream.times[-1]
    row = _row(LONG_PROMPT, size.streams, contender, [long_stream], load)
    return {
        **row, "seconds": rounded(seconds), "cpu_seconds": rounded(used),
        "tokens": sum(one.num_tokens for one in [*whole, long_stream]), "texts": len(whole) + 1,
        "pause": _longest(one.pauses(*period) for one in whole),
        "silence": _longest(one.silences(*period) for one in whole),
        "short": sum(one.num_tokens < size.num_tokens for one in whole),
    }  # fmt: skip


def with_turns(
    contender: Contender, server: Server, texts: Sequence[str], size: Size
) -> tuple[list[Row], list[str]]:
    """Return a row for each turn of a conversation, and the answers.

    Args:
        contender: Whose server it is.
        server: The server.
        texts: What the user says.
        size: How much is written.
    """
    dialect = Chat(contender.dialect.fields)
    messages, answers, rows = [], [], []
    for turn, text in enumerate(texts, 1):
        load, used, began = os.getloadavg()[0], server.cpu_seconds(), time.perf_counter()
        messages.append({"role": "user", "content": text})
        stream = ask(server.port, dialect, messages, size.num_tokens)
        rows.append(
            {
                **_row(PREFIXES, turn, contender, [stream], load),
                "seconds": rounded(time.perf_counter() - began),
                "cpu_seconds": rounded(server.cpu_seconds() - used),
            }
        )
        messages.append({"role": "assistant", "content": stream.text})
        answers.append(stream.text)
    return rows, answers


def _row(part: str, case: int, contender: Contender, streams: list[Stream], load: float) -> Row:
    firsts = [stream.first for stream in streams]
    cached = [stream.num_cached for stream in streams if stream.num_cached is not None]
    return {
        "match": part, "case": case, "round": 0, "name": contender.name,
        "engine": contender.engine, "kind": contender.kind, "strategy": contender.strategy,
        "seconds": 0.0, "tokens": sum(stream.num_tokens for stream in streams),
        "cpu_seconds": 0.0, "first": rounded(statistics.median(firsts)),
        "first_95": rounded(percentile(firsts, 0.95)),
        "pause": _longest(stream.pauses() for stream in streams),
        "silence": _longest(stream.silences() for stream in streams),
        "texts": len(streams), "same": None, "short": 0,
        "cached": sum(cached) if cached else None, "load": rounded(load),
    }  # fmt: skip


def _longest(lists: Sequence[list[float]]) -> float:
    return rounded(max(itertools.chain(*lists), default=0.0))
