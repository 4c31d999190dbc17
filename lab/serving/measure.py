"""Rounds of all parts: contenders take turns, every row is kept at once."""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from lab.contests.contenders import OURS
from lab.contests.rounds import Row, Store
from lab.serving.clients import ask, closed_loop
from lab.serving.contenders import FULL, Contender
from lab.serving.dialects import Prompt
from lab.serving.parts import (
    LONG_PROMPT,
    PREFIXES,
    THROUGHPUT,
    Size,
    alone,
    with_clients,
    with_long_prompt,
    with_turns,
)
from lab.serving.rows import rows_of
from lab.serving.servers import Server, Servers
from megatron_sorted.errors import PlatformError

WARM_TEXTS, WARM_TOKENS = 4, 8


@dataclass
class Measurement:
    """What is measured, and where rows go.

    Attributes:
        store: The rows.
        servers: The servers.
        size: How much is written.
        clients: Numbers of clients.
        prompts: Prompts of all parts.
        long: The long prompt.
        minutes: Time after which no round is begun that would probably pass it.
        contenders: Contenders of each part.
        began: When the measurement began.
    """

    store: Store
    servers: Servers
    size: Size
    clients: Sequence[int]
    prompts: Sequence[Prompt]
    long: Prompt
    minutes: float
    contenders: dict[str, list[Contender]]
    began: float = field(default_factory=time.monotonic)

    def run(self, rounds: int, after_round: Callable[[], None]) -> None:
        """Measure the rounds of every part that are not kept yet.

        Args:
            rounds: Number of rounds.
            after_round: Called after each round.
        """
        plays = {
            PREFIXES: self._play_prefixes,
            LONG_PROMPT: self._play_long_prompt,
            THROUGHPUT: self._play_throughput,
        }
        for part, play in plays.items():
            wanted = self.contenders.get(part, [])
            if not wanted or self.is_complete(part, rounds):
                continue
            ready = self._start(wanted)
            longest = 0.0
            for number in range(rounds):
                if self.is_complete(part, number + 1):
                    continue
                start = time.monotonic()
                if (start - self.began + longest) / 60 > self.minutes:
                    print(f"{part}: no time for round {number + 1}", file=sys.stderr, flush=True)
                    break
                first = number % max(len(ready), 1)
                play(number, [*ready[first:], *ready[:first]])
                longest = max(longest, time.monotonic() - start)
                after_round()

    def is_complete(self, part: str, rounds: int) -> bool:
        """Return whether all contenders that can take part have these rounds."""
        cases = self.clients if part == THROUGHPUT else [None]
        return all(
            rows_of(
                self.store.rows, match=part, name=contender.name, round=rounds - 1,
                **({} if case is None else {"case": case}),
            )
            for contender in self.contenders.get(part, [])
            if contender.name not in self.store.facts.get("absent", {})
            for case in cases
        )  # fmt: skip

    def _start(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Start and warm the servers of contenders; return those that write."""
        self.servers.keep_only({contender.launch for contender in contenders})
        ready = []
        for contender in tqdm(contenders, "servers", unit="contender"):
            warmed = self._turn(
                contender, lambda server, one=contender: warm_up(one, server, self.prompts)
            )
            if warmed is not None:
                ready.append(contender)
        return ready

    def _turn(self, contender: Contender, work: Callable[[Server], Any]) -> Any:
        """Return what a contender does in its turn; None if it is left out, or fails."""
        absent = self.store.facts.setdefault("absent", {})
        if contender.name in absent:
            return None
        try:
            with self.servers.turn_of(contender.launch) as server:
                return work(server)
        except PlatformError as error:
            absent[contender.name] = str(error).rpartition("\n")[2]  # of a log, its last line
            print(f"{contender.name} is left out: {error}", file=sys.stderr, flush=True)
            self.store.write()
            return None

    def _references(self, ready: Sequence[Contender]) -> dict[str, list[str]]:
        """Return digests of the texts that prompts get alone, by kind of weights."""
        kept = self.store.facts.setdefault("alone", {})
        for contender in sorted(ready, key=lambda one: one.engine != OURS):
            if contender.kind not in kept and contender.strategy == FULL:
                with self.servers.turn_of(contender.launch) as server:
                    kept[contender.kind] = alone(contender, server, self.prompts, self.size)
                self.store.write()
        return kept

    def _play_throughput(self, number: int, ready: Sequence[Contender]) -> None:
        references = self._references(ready)
        total = len(self.clients) * len(ready)
        with tqdm(total=total, desc=f"{THROUGHPUT} {number + 1}", unit="turn") as progress:
            for clients in self.clients:
                for contender in ready:
                    known = references.get(contender.kind)
                    if not self._has(THROUGHPUT, clients, number, contender):
                        row = self._turn(
                            contender,
                            lambda server, one=contender, count=clients, known=known: with_clients(
                                one, server, self.prompts, self.size, count, known
                            ),
                        )
                        self._keep([row], number)
                    progress.update()

    def _play_long_prompt(self, number: int, ready: Sequence[Contender]) -> None:
        for contender in tqdm(ready, f"{LONG_PROMPT} {number + 1}", unit="turn"):
            if not self._has(LONG_PROMPT, self.size.streams, number, contender):
                row = self._turn(
                    contender,
                    lambda server, one=contender: with_long_prompt(
                        one, server, self.prompts, self.size, self.long
                    ),
                )
                self._keep([row], number)

    def _play_prefixes(self, number: int, ready: Sequence[Contender]) -> None:
        """Write one conversation with every contender; another one in every round."""
        turns = self.size.turns
        places = range(number * turns, (number + 1) * turns)
        texts = [self.prompts[place % len(self.prompts)].text for place in places]
        texts[0] = f"{number + 1}. {texts[0]}"  # no round begins as an earlier one
        references: dict[str, list[str]] = {}
        for contender in tqdm(ready, f"{PREFIXES} {number + 1}", unit="turn"):
            done = self._turn(
                contender, lambda server, one=contender: with_turns(one, server, texts, self.size)
            )
            if done is None:
                continue
            rows, answers = done
            reference = references.setdefault(contender.kind, answers)
            for turn, row in enumerate(rows, 1):
                row["same"] = int(answers[:turn] == reference[:turn])
            self._keep(rows, number)

    def _has(self, part: str, case: int, number: int, contender: Contender) -> bool:
        return bool(
            rows_of(self.store.rows, match=part, case=case, round=number, name=contender.name)
        )

    def _keep(self, rows: Sequence[Row], number: int) -> None:
        self.store.add([{**row, "round": number} for row in rows if row is not None])


def warm_up(contender: Contender, server: Server, prompts: Sequence[Prompt]) -> list:
    """Let a contender write some short texts at once."""
    return closed_loop(
        [
            [functools.partial(ask, server.port, contender.dialect, one, WARM_TOKENS)]
            for one in prompts[:WARM_TEXTS]
        ]
    )
