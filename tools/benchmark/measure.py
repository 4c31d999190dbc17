"""Runs the processes and gathers what they measured."""

import argparse
import sys
import time
from dataclasses import dataclass

from benchmark.cases import Case, case_settings
from benchmark.flops import step_flops
from benchmark.worker import Worker, returning_freed_memory

MINIMUM_ROUNDS = 3
MEMORY_WORKERS_AT_ONCE = 2


@dataclass(frozen=True)
class Measured:
    """One case: a wall and a CPU time per round, peak memory, operations of a step."""

    case: Case
    seconds: list[float]
    cpu_seconds: list[float]
    peak_bytes: int
    flops: int


@dataclass(frozen=True)
class ShapeResult:
    """All cases of a shape, the plain model first, and its operations as torch counts them."""

    rows: list[Measured]
    counted_flops: int

    def per_round(self, row: Measured, cpu: bool) -> list[float]:
        """Returns the row's time over the plain model's, round by round: wall time, or CPU time of the process."""
        plain = self.rows[0]
        pairs = zip(row.cpu_seconds, plain.cpu_seconds, strict=True) if cpu else zip(row.seconds, plain.seconds, strict=True)
        return [mine / theirs for mine, theirs in pairs]


def _say(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _start(shape: str, cases: list[Case], options: argparse.Namespace) -> list[Worker]:
    workers = [Worker(shape, case, options.device, options.bf16, options.threads) for case in cases]
    for worker in workers:
        worker.answer()
    return workers


def _peaks(shape: str, cases: list[Case], options: argparse.Namespace) -> list[int]:
    """Returns the peak memory of a step of each case, each in a fresh process."""
    peaks = []
    with returning_freed_memory():
        for first in range(0, len(cases), MEMORY_WORKERS_AT_ONCE):
            group = cases[first : first + MEMORY_WORKERS_AT_ONCE]
            _say(f"shape {shape}: memory of {' and '.join(case.name for case in group)}")
            workers = _start(shape, group, options)
            for worker in workers:
                worker.ask("peak")
            peaks += [worker.answer() for worker in workers]
            for worker in workers:
                worker.stop()
    return peaks


def _times(shape: str, cases: list[Case], options: argparse.Namespace) -> tuple[list[list[tuple[float, float]]], int]:
    """Returns for each case (seconds, CPU seconds) of each round, and torch's count of the plain model's operations."""
    _say(f"shape {shape}: starting {len(cases)} models")
    workers = [worker for first in range(0, len(cases), 2) for worker in _start(shape, cases[first : first + 2], options)]
    workers[0].ask("flops")
    counted = workers[0].answer()
    times: list[list[tuple[float, float]]] = [[] for _ in cases]
    start, num_rounds = time.monotonic(), 0
    while num_rounds < (1 if options.quick else MINIMUM_ROUNDS) or (not options.quick and time.monotonic() - start < options.seconds):
        for index, worker in enumerate(workers):
            _say(f"shape {shape}: round {num_rounds + 1}, {cases[index].name}")
            worker.ask("step")
            times[index].append(worker.answer())
        num_rounds += 1
    for worker in workers:
        worker.stop()
    return times, counted


def measure_shape(shape: str, cases: list[Case], options: argparse.Namespace) -> ShapeResult:
    """Returns what was measured of a shape."""
    peaks = _peaks(shape, cases, options)
    times, counted = _times(shape, cases, options)
    _say("")
    rows = []
    for case, peak, rounds in zip(cases, peaks, times, strict=True):
        flops = step_flops(case_settings(shape, case, options.device, options.bf16), case.num_exits + 1)
        rows.append(Measured(case, [wall for wall, _ in rounds], [cpu for _, cpu in rounds], peak, flops))
    return ShapeResult(rows, counted)
