"""Servers of a small model for tests, as processes, with what their clients need."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.reliability.soak.client import Client
from lab.reliability.soak.model import DEPTHS
from lab.reliability.soak.served import Served, read_counts
from tests.support.commands import command_line, environment

SETTLE_SECONDS = 60


@contextmanager
def served(model: Path, *arguments: object) -> Iterator[Served]:
    """Yield a server of a model that can be reached; it is ended afterwards."""
    server = Served(
        command_line(
            *("tools/serve.py", model, "--depths", *DEPTHS, "--device", "cpu", "--port", 0),
            *("--generation-config", "none", "--no-request-log", *arguments),
        ),
        model.parent / f"{time.monotonic_ns()}.log",
        environment(),
    )
    try:
        yield server
    finally:
        server.kill()


def counts_of(server: Served) -> dict[str, float]:
    """Return the server's counts."""
    return asyncio.run(read_counts(Client(server.port)))


def wait_for_counts(server: Served, **wanted: int) -> dict[str, float]:
    """Wait until the server's counts are these, and return all.

    Raises:
        AssertionError: They are not after a minute.
    """
    until = time.monotonic() + SETTLE_SECONDS
    while any((counts := counts_of(server))[name] != value for name, value in wanted.items()):
        assert time.monotonic() < until, {name: counts[name] for name in wanted}
        time.sleep(0.02)
    return counts
