"""Rendezvous of a job's processes in a TCP store, which names those that do not arrive."""

import json
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_sorted.doctor.network.process_report import ProcessReport
from megatron_sorted.platform.processes import World

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 30.0
"""How much longer the other ranks wait than rank 0, which prints the reason."""
LEAVE_SECONDS = 3.0


class MissingRanksError(Exception):
    """Some processes did not arrive in time.

    Attributes:
        missing: The ranks that did not arrive.
        reports: Reports of the processes that did.
    """

    def __init__(self, missing: Sequence[int], reports: Sequence[ProcessReport]):
        super().__init__(f"{len(missing)} of {len(missing) + len(reports)} processes are missing")
        self.missing, self.reports = list(missing), list(reports)


def open_store(world: World, environment: Mapping[str, str], limit_seconds: float) -> dist.Store:
    """Return the store of this job: the launcher's, or one that rank 0 serves.

    Raises:
        RuntimeError: No process serves it at MASTER_ADDR:MASTER_PORT within the limit.
        ValueError: MASTER_PORT is not a port.
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


def put(store: dist.Store, what: str, rank: int, value: Any) -> None:
    """Put a value of JSON into the store for `gather`."""
    store.set(f"{what}/{rank}", json.dumps(value))


def gather(
    store: dist.Store, what: str, ranks: Sequence[int], limit_seconds: float
) -> dict[int, Any]:
    """Return what ranks have put into the store under a name, as far as it arrives in time.

    Where SIGTERM is held back (`job.hold_termination`), its arrival ends the wait.
    """
    until = time.monotonic() + limit_seconds
    values: dict[int, Any] = {}
    while True:
        for rank in ranks:
            if rank not in values and store.check([f"{what}/{rank}"]):
                values[rank] = json.loads(store.get(f"{what}/{rank}"))
        if len(values) == len(ranks) or time.monotonic() > until or stop_requested():
            return values
        time.sleep(POLL_SECONDS)


def stop_requested() -> bool:
    """Return whether the launcher has sent SIGTERM to this process, which held it back."""
    return signal.SIGTERM in signal.sigpending()


def dismiss(store: dist.Store, size: int) -> None:
    """Let the other processes end, and wait shortly: a store of rank 0 ends with this process."""
    put(store, "done", 0, True)
    gather(store, "leave", range(1, size), LEAVE_SECONDS)


def wait_for_dismissal(store: dist.Store, rank: int, limit_seconds: float) -> None:
    """Wait until rank 0 has printed everything."""
    with suppress(RuntimeError):  # the store has ended with rank 0
        gather(store, "done", [0], limit_seconds)
        put(store, "leave", rank, True)


def exchange_reports(
    store: dist.Store, world: World, report: ProcessReport, limit_seconds: float
) -> list[ProcessReport]:
    """Return the reports of all processes, by rank.

    Collective: every process of the job; one key a process, and one of rank 0 that lists arrivals.

    Raises:
        MissingRanksError: Some did not arrive within the limit; on all processes that did.
    """
    put(store, "report", world.rank, asdict(report))
    if world.rank == 0:
        arrived = gather(store, "report", range(world.size), limit_seconds)
        put(store, "arrived", 0, sorted(arrived))
    else:
        answer = gather(store, "arrived", [0], limit_seconds + PATIENCE_SECONDS)
        if not answer:
            raise MissingRanksError([0], [report])
        arrived = gather(store, "report", answer[0], limit_seconds)
    reports = [ProcessReport(**data) for _, data in sorted(arrived.items())]
    if missing := sorted(set(range(world.size)) - set(arrived)):
        raise MissingRanksError(missing, reports)
    return reports
