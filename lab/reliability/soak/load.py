"""The load of a soak: clients that come and leave at random, and others that watch the server."""

import asyncio
import itertools
import random
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from lab.reliability.soak.bad_bodies import BadRequest
from lab.reliability.soak.client import LEAVES, Answer, Client, Leave, head_of
from lab.reliability.soak.requests import COMPLETIONS, Pool, PooledRequest, Talk, pooled
from lab.reliability.soak.served import ProcessUsage, Served, read_counts

BAD_SHARE, LEAVING_SHARE = 0.08, 0.2
PROBES = tuple(
    pooled(COMPLETIONS, prompt=f"the {word}", max_tokens=2, temperature=0)
    for word in ("cat", "dog", "bird", "house")
)
"""Small requests, which long ones must not hold up."""
PROBE_SECONDS, HEALTH_SECONDS, USAGE_SECONDS = 0.5, 0.25, 1.0
SETTLE_SECONDS = 30.0


@dataclass(frozen=True)
class Outcome:
    """A request for texts, and what came of it.

    Attributes:
        request: The request.
        leave: When the client left; None if it stayed.
        answer: What it got.
    """

    request: PooledRequest
    leave: Leave | None
    answer: Answer


@dataclass
class Seen:
    """What all clients saw.

    Attributes:
        outcomes: Requests for texts.
        probes: Small ones among them.
        refused: Bad requests, and what they got.
        health: Seconds of each answer of /health; infinite for a wrong one.
        usage: What the server used, second by second.
        before, after: The server's counts.
        idle, settled: What the server used before the first request, and when all was over.
        seconds: Time from the first request to the last answer.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    probes: list[Outcome] = field(default_factory=list)
    refused: list[tuple[BadRequest, Answer]] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    usage: list[ProcessUsage] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    idle: ProcessUsage | None = None
    settled: ProcessUsage | None = None
    seconds: float = 0.0

    def num_of(self, name: str) -> float:
        """Return how much one of the server's counts grew."""
        return self.after.get(name, 0) - self.before.get(name, 0)


class Load:
    """The clients of one server.

    Args:
        served: The server.
        pool: The requests.
        bad: Requests that it must refuse.
        keys: API keys, of which each client has one.
        num_clients: Number of clients.
        patience: Longest time for a response in seconds.
        pause: Mean time between an answer and the next request of a client.
    """

    def __init__(
        self,
        served: Served,
        pool: Pool,
        bad: Sequence[BadRequest],
        keys: Sequence[str],
        num_clients: int = 64,
        patience: float = 600.0,
        pause: float = 0.5,
    ):
        self.served, self.pool, self.bad, self.pause = served, pool, list(bad), pause
        self.clients = [
            Client(served.port, {"Authorization": f"Bearer {keys[number % len(keys)]}"}, patience)
            for number in range(num_clients)
        ]
        self.open_client = Client(served.port, {}, patience)

    async def each_once(self) -> Seen:
        """Ask every request and refuse every bad one once; no one leaves."""
        seen, chance, requests = Seen(), random.Random(0), iter(self.pool.requests)
        talks, bad = iter(self.pool.talks), iter(self.bad)

        async def work(client: Client) -> None:
            for request in requests:
                await self._ask(seen, client, request, chance.random() < 0.5)
            for talk in talks:
                await self._talk(seen, client, talk, chance)
            for one in bad:
                await self._send_bad(seen, client, one)

        await self._watched(seen, [work(client) for client in self.clients])
        return seen

    async def at_random(self, seconds: float, seed: int) -> Seen:
        """Send requests at random for some time, then wait for the last answers."""
        seen, until = Seen(), time.monotonic() + seconds

        async def work(number: int, client: Client) -> None:
            chance = random.Random(f"{seed} {number}")
            await asyncio.sleep(chance.uniform(0, min(seconds / 4, 5)))
            while time.monotonic() < until:
                if chance.random() < BAD_SHARE:
                    await self._send_bad(seen, client, chance.choice(self.bad))
                elif isinstance(drawn := self.pool.draw(chance), Talk):
                    await self._talk(seen, client, drawn, chance)
                else:
                    is_stream = chance.random() < 0.6
                    leave = draw_leave(chance, is_stream)
                    await self._ask(seen, client, drawn, is_stream, leave)
                await asyncio.sleep(chance.expovariate(1 / self.pause))

        await self._watched(seen, [work(*one) for one in enumerate(self.clients)])
        return seen

    async def _watched(self, seen: Seen, works: Sequence[Coroutine]) -> None:
        """Run the work of clients, with others that watch the server."""
        seen.before, began = await read_counts(self.open_client), time.monotonic()
        seen.idle, over = self.served.usage(), asyncio.Event()
        watching = asyncio.gather(
            self._watch_health(seen, over), self._watch_usage(seen, over), self._probe(seen, over)
        )
        try:
            await asyncio.gather(*works)
        finally:
            over.set()
            await watching
        seen.seconds = time.monotonic() - began
        await self._settle(seen)

    async def _settle(self, seen: Seen) -> None:
        """Wait until the server has nothing to do."""
        until = time.monotonic() + SETTLE_SECONDS
        idle = ("requests_waiting", "requests_running", "texts_waiting", "texts_running")
        while True:
            seen.after, seen.settled = await read_counts(self.open_client), self.served.usage()
            if not any(seen.after[name] for name in idle) or time.monotonic() > until:
                return
            await asyncio.sleep(0.1)

    async def _ask(
        self,
        seen: Seen,
        client: Client,
        request: PooledRequest,
        is_stream: bool,
        leave: Leave | None = None,
    ) -> Answer:
        answer = await client.ask(request.path, request.body, is_stream, leave)
        seen.outcomes.append(Outcome(request, leave, answer))
        return answer

    async def _talk(self, seen: Seen, client: Client, talk: Talk, chance: random.Random) -> None:
        answers: list[str] = []
        for _ in talk.users:
            request = talk.turn(answers)
            answer = await self._ask(seen, client, request, chance.random() < 0.5)
            if answer.status != 200 or not answer.is_complete:
                return
            answers.append(answer.texts[0])

    async def _send_bad(self, seen: Seen, client: Client, bad: BadRequest) -> None:
        headers = {**(client.headers if bad.has_key else {}), **bad.headers}
        head = head_of(bad.path, len(bad.body), headers, bad.method)
        seen.refused.append((bad, await client.send(head, bad.body)))

    async def _probe(self, seen: Seen, over: asyncio.Event) -> None:
        requests = itertools.cycle(PROBES)
        while await _still(over, PROBE_SECONDS):
            request = next(requests)
            answer = await self.clients[0].ask(request.path, request.body, True)
            seen.probes.append(Outcome(request, None, answer))

    async def _watch_health(self, seen: Seen, over: asyncio.Event) -> None:
        while await _still(over, HEALTH_SECONDS):
            answer = await self.open_client.get("/health")
            is_well = answer.status == 200 and answer.last.get("status") == "ok"
            seen.health.append(answer.seconds if is_well else float("inf"))

    async def _watch_usage(self, seen: Seen, over: asyncio.Event) -> None:
        while await _still(over, USAGE_SECONDS):
            seen.usage.append(self.served.usage())


async def _still(over: asyncio.Event, seconds: float) -> bool:
    """Wait; return whether it is not over yet."""
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(over.wait(), seconds)
    return not over.is_set()


def draw_leave(chance: random.Random, is_stream: bool) -> Leave | None:
    """Return when a client leaves; None if it stays."""
    if chance.random() > LEAVING_SHARE:
        return None
    moment = chance.choice(LEAVES if is_stream else LEAVES[:2])
    return Leave(moment, chance.choice((0, 0.01, 0.1, 0.5)), chance.randint(0, 6))
