"""Processes that hold measured models and take one step of a model for each request."""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from lab.benchmarks.cases import Case, case_settings

SPAWN = multiprocessing.get_context("spawn")
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""Makes glibc return freed blocks at once, so that resident memory is memory in use.

It is slower, so it is not set where time is measured.
"""


class StepCost(NamedTuple):
    """What one step took in one process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def answer_requests(
    connection: Connection, steps: Mapping[str, Callable[[], Any]], platform, first: Any = "ready"
) -> None:
    """Send ``first``, then answer requests until "stop", and end this process.

    Requests are ("step", name), answered by a `StepCost`, and ("flops", name), answered by the
    operations of a step as torch counts them.
    """
    connection.send(first)
    while (request := connection.recv()) != "stop":
        kind, name = request
        if kind == "flops":
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counter:
                steps[name]()
            connection.send(counter.get_total_flops())
            continue
        platform.synchronize()
        platform.reset_peak_memory()
        start, cpu_start = time.perf_counter(), time.process_time()
        steps[name]()
        platform.synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        connection.send(StepCost(seconds, cpu_seconds, platform.peak_memory_bytes()))
    connection.close()
    os._exit(0)  # peers may have left; nothing has to be closed in order


class Worker:
    """A process that runs ``serve(connection, *arguments)``, which ends in `answer_requests`.

    The first answer comes without a request, once the process is ready.
    """

    def __init__(self, name: str, serve: Callable, *arguments: Any, context: Any = SPAWN):
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def request(self, kind: str, name: str = "") -> None:
        """Send a request; `answer` returns its answer."""
        self.connection.send((kind, name))

    def answer(self) -> Any:
        """Return the next answer.

        Raises:
            RuntimeError: The process died.
        """
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: the process died; its error is above") from None

    def step(self, name: str = "") -> StepCost:
        """Return what the next step of a model took."""
        self.request("step", name)
        return self.answer()

    def stop(self) -> None:
        """End the process."""
        self.connection.send("stop")
        self.process.join()


def serve_case(
    connection: Connection, shape: str, case: Case, device: str, bf16: bool, threads: int
) -> None:
    """Train the steps of one case, after a first one that creates the optimizer's state."""
    from lab.benchmarks.trainer import start_platform

    platform = start_platform(device, threads)
    from lab.benchmarks.models import make_trainer

    step = make_trainer(case, case_settings(shape, case, device, bf16), platform)
    step()
    answer_requests(connection, {"": step}, platform)


@contextmanager
def returning_freed_memory():
    """Start processes inside with an allocator that returns freed memory at once."""
    before = {name: os.environ.get(name) for name in RETURN_FREED_MEMORY}
    os.environ.update(RETURN_FREED_MEMORY)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
