"""Runs the processes and gathers what they measured."""

import argparse
import statistics
import sys
from dataclasses import dataclass

from lab.benchmarks.cases import MEMORY_SHAPES, Case, case_settings
from lab.benchmarks.flops import step_flops
from lab.benchmarks.worker import StepWorker, returning_freed_memory

EXTRA_ROUNDS = 4
"""Rounds of plain and ours without early exits alone: their ratio has the narrowest bound, and they are cheap."""
STARTED_AT_ONCE = 2


@dataclass(frozen=True)
class Measured:
    """One case: {round: (seconds, CPU seconds)}, peak memory in bytes (None: not asked for), operations of a step."""

    case: Case
    rounds: dict[int, tuple[float, float]]
    peak_bytes: int | None
    flops: int

    def seconds(self, cpu: bool) -> float:
        """Return the median time of a step: wall time, or CPU time of the process."""
        return statistics.median(times[cpu] for times in self.rounds.values())

    def times(self, other: "Measured", cpu: bool) -> float:
        """Return the median over common rounds of this case's time over the other's."""
        return statistics.median(
            self.rounds[n][cpu] / other.rounds[n][cpu]
            for n in self.rounds.keys() & other.rounds.keys()
        )


@dataclass(frozen=True)
class ShapeResult:
    """All cases of a shape, the plain model first, and its operations as torch counts them."""

    rows: list[Measured]
    counted_flops: int


def _say(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _start(shape: str, cases: list[Case], options: argparse.Namespace) -> list[StepWorker]:
    workers = [
        StepWorker(shape, case, options.device, options.bf16, options.threads) for case in cases
    ]
    for worker in workers:
        worker.answer()
    return workers


def _peaks(shape: str, cases: list[Case], options: argparse.Namespace) -> list[int]:
    """Return the peak memory of a step of each case, each in a fresh process."""
    peaks = []
    with returning_freed_memory():
        for first in range(0, len(cases), STARTED_AT_ONCE):
            group = cases[first : first + STARTED_AT_ONCE]
            _say(f"shape {shape}: memory of {' and '.join(case.name for case in group)}")
            workers = _start(shape, group, options)
            for worker in workers:
                worker.ask("peak")
            peaks += [worker.answer() for worker in workers]
            for worker in workers:
                worker.stop()
    return peaks


def _turns(cases: list[Case], quick: bool, rounds: int) -> list[list[int]]:
    """Return the cases of each round: all in the first; then without eager ones, which only show scale; then the extra rounds."""
    everything = list(range(len(cases)))
    main = [n for n in everything if cases[n].kind != "eager"]
    pair = [n for n in main if cases[n].num_exits == 0]
    return [everything] + [main] * (0 if quick else rounds - 1) + [pair] * EXTRA_ROUNDS


def _times(
    shape: str, cases: list[Case], options: argparse.Namespace
) -> tuple[list[dict[int, tuple[float, float]]], int]:
    """Return for each case {round: (seconds, CPU seconds)}, and torch's count of the plain model's operations."""
    _say(f"shape {shape}: starting {len(cases)} models")
    starts = range(0, len(cases), STARTED_AT_ONCE)
    workers = [
        worker
        for first in starts
        for worker in _start(shape, cases[first : first + STARTED_AT_ONCE], options)
    ]
    workers[0].ask("flops")
    counted = workers[0].answer()
    times: list[dict[int, tuple[float, float]]] = [{} for _ in cases]
    turns = _turns(cases, options.quick, options.rounds)
    for number, turn in enumerate(turns):
        for index in turn:
            _say(f"shape {shape}: round {number + 1} of {len(turns)}, {cases[index].name}")
            workers[index].ask("step")
            times[index][number] = workers[index].answer()
    for worker in workers:
        worker.stop()
    return times, counted


def measure_shape(shape: str, cases: list[Case], options: argparse.Namespace) -> ShapeResult:
    """Return what was measured of a shape."""
    peaks = _peaks(shape, cases, options) if shape in MEMORY_SHAPES else [None] * len(cases)
    times, counted = _times(shape, cases, options)
    _say("")
    rows = []
    for case, peak, rounds in zip(cases, peaks, times, strict=True):
        flops = step_flops(
            case_settings(shape, case, options.device, options.bf16), case.num_exits + 1
        )
        rows.append(Measured(case, rounds, peak, flops))
    return ShapeResult(rows, counted)
