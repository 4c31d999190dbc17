"""How the processes of a job meet: in a store that needs nothing but TCP, so that whoever does not come can be named."""

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_sorted.doctor.network.cards import Card
from megatron_sorted.platform.processes import World

POLL_SECONDS = 0.1
# the others wait longer than rank 0, which has something to say
PATIENCE_SECONDS, LEAVE_SECONDS = 30.0, 3.0


class MissingRanksError(Exception):
    """Some processes did not come in time.

    Attributes:
        missing: Their ranks.
        cards: Cards of those that came.
    """

    def __init__(self, missing: Sequence[int], cards: Sequence[Card]):
        super().__init__(f"{len(missing)} of {len(missing) + len(cards)} processes did not come")
        self.missing, self.cards = list(missing), list(cards)


def open_store(world: World, environment: Mapping[str, str], limit_seconds: float) -> dist.Store:
    """Return the store of this job: the launcher's, or one that rank 0 serves.

    Raises:
        RuntimeError: Nobody serves it at MASTER_ADDR:MASTER_PORT within the limit.
    """
    launcher_serves = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        is_master=world.rank == 0 and not launcher_serves,
        timeout=timedelta(seconds=limit_seconds),
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"doctor/{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def gather(
    store: dist.Store, what: str, ranks: Sequence[int], limit_seconds: float
) -> dict[int, Any]:
    """Return what ranks have put into the store under a name, as far as it comes within the limit.

    Where SIGTERM is held back (`job.hold_termination`), its arrival ends the wait.
    """
    until = time.monotonic() + limit_seconds
    found: dict[int, Any] = {}
    while True:
        for rank in ranks:
            if rank not in found and store.check([f"{what}/{rank}"]):
                found[rank] = json.loads(store.get(f"{what}/{rank}"))
        if len(found) == len(ranks) or time.monotonic() > until or was_told_to_stop():
            return found
        time.sleep(POLL_SECONDS)


def dismiss(store: dist.Store, size: int) -> None:
    """Tell the others that all is over, and waits a little for their leave: the store ends with this process where rank 0 serves it."""
    put(store, "done", 0, True)
    gather(store, "leave", range(1, size), LEAVE_SECONDS)


def wait_for_the_end(store: dist.Store, rank: int, limit_seconds: float) -> None:
    """Wait until rank 0 has said all there is to say."""
    try:
        gather(store, "done", [0], limit_seconds)
        put(store, "leave", rank, True)
    except RuntimeError:  # the store is gone with rank 0
        return


def was_told_to_stop() -> bool:
    """Return whether the launcher has told this process to end, which held the signal back."""
    return signal.SIGTERM in signal.sigpending()


def put(store: dist.Store, what: str, rank: int, value: Any) -> None:
    """Put something into the store for `gather`."""
    store.set(f"{what}/{rank}", json.dumps(value))


def meet(store: dist.Store, world: World, card: Card, limit_seconds: float) -> list[Card]:
    """Return the cards of all processes, by rank.

    Collective: every process of the job; one key a process, and one of rank 0 that says who came.

    Raises:
        MissingRanksError: Some did not come within the limit; on all processes that did.
    """
    put(store, "card", world.rank, asdict(card))
    if world.rank == 0:
        came = gather(store, "card", range(world.size), limit_seconds)
        put(store, "came", 0, sorted(came))
    else:
        answer = gather(store, "came", [0], limit_seconds + PATIENCE_SECONDS)
        if not answer:
            raise MissingRanksError([0], [card])
        came = gather(store, "card", answer[0], limit_seconds)
    cards = [Card(**data) for _, data in sorted(came.items())]
    if missing := sorted(set(range(world.size)) - set(came)):
        raise MissingRanksError(missing, cards)
    return cards
