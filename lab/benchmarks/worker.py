"""A process that holds one case and answers what it is asked: step times, or the peak memory of a step."""

import multiprocessing
import os
import time
from contextlib import contextmanager
from multiprocessing.connection import Connection

from lab.benchmarks.cases import Case

SPAWN = multiprocessing.get_context("spawn")
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""glibc gives freed blocks back at once, so that resident memory is memory in use; slower, so not where time is measured."""


def _serve(
    connection: Connection, shape: str, case: Case, device: str, bf16: bool, threads: int
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from lab.benchmarks.cases import case_settings
    from lab.benchmarks.trainer import start_platform

    platform = start_platform(device, threads)
    from lab.benchmarks.models import make_trainer

    step = make_trainer(case, case_settings(shape, case, device, bf16), platform)
    step()  # the optimizer makes its state, kernels are chosen
    connection.send("ready")
    while (question := connection.recv()) != "stop":
        platform.synchronize()
        platform.reset_peak_memory()
        start, cpu_start = time.perf_counter(), time.process_time()
        if question == "flops":
            with FlopCounterMode(display=False) as counter:
                step()
            connection.send(counter.get_total_flops())
            continue
        step()
        platform.synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        connection.send(
            {"step": (seconds, cpu_seconds), "peak": platform.peak_memory_bytes()}[question]
        )
    connection.close()
    os._exit(0)  # one process: there are no peers to part from in order


class StepWorker:
    """The other end of ``_serve``: starts the process.

    Questions: "step": (seconds, CPU seconds) of a step; "peak": bytes; "flops": operations of a step as torch counts them.
    """

    def __init__(self, shape: str, case: Case, device: str, bf16: bool, threads: int):
        self.connection, theirs = SPAWN.Pipe()
        self.case = case
        self.process = SPAWN.Process(
            target=_serve, args=(theirs, shape, case, device, bf16, threads), daemon=True
        )
        self.process.start()
        theirs.close()

    def ask(self, question: str) -> None:
        """Send a question; ``answer`` then returns its answer. (The first answer comes unasked: "ready", after one step.)"""
        self.connection.send(question)

    def stop(self) -> None:
        """End the process."""
        self.ask("stop")
        self.process.join()

    def answer(self):
        """Return the next answer.

        Raises:
            RuntimeError: The process died.
        """
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.case.name}: the process died; its error is above") from None


@contextmanager
def returning_freed_memory():
    """Return a context in which started processes have an allocator that gives freed memory back."""
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
