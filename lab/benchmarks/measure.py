"""The measurement of one shape: memory of each case by itself, then times of all cases in turns."""

import argparse
import statistics
from dataclasses import dataclass

from lab.benchmarks.cases import MEMORY_SHAPES, Case, case_settings
from lab.benchmarks.flops import step_flops
from lab.benchmarks.worker import Worker, returning_freed_memory, serve_case
from lab.results.pages import show_progress

EXTRA_ROUNDS = 4
"""Rounds of plain and ours without early exits alone: their ratio has the narrowest bound."""
STARTED_AT_ONCE = 2


@dataclass(frozen=True)
class Measured:
    """The measurements of one case.

    Attributes:
        rounds: {round: (seconds, CPU seconds)}.
        peak_bytes: Peak memory of a step, None where memory is not measured.
        flops: Operations of a step.
    """

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


def _start(shape: str, cases: list[Case], options: argparse.Namespace) -> list[Worker]:
    workers = [
        Worker(case.name, serve_case, shape, case, options.device, options.bf16, options.threads)
        for case in cases
    ]
    for worker in workers:
        worker.answer()
    return workers


def _groups(cases: list[Case]) -> list[list[Case]]:
    starts = range(0, len(cases), STARTED_AT_ONCE)
    return [cases[first : first + STARTED_AT_ONCE] for first in starts]


def _peaks(shape: str, cases: list[Case], options: argparse.Namespace) -> list[int]:
    """Return the peak memory of a step of each case, each in a fresh process."""
    peaks = []
    with returning_freed_memory():
        for group in _groups(cases):
            show_progress(f"shape {shape}: memory of {' and '.join(case.name for case in group)}")
            workers = _start(shape, group, options)
            for worker in workers:
                worker.request("step")
            peaks += [worker.answer().peak_bytes for worker in workers]
            for worker in workers:
                worker.stop()
    return peaks


def _turns(cases: list[Case], quick: bool, rounds: int) -> list[list[int]]:
    """Return the cases of each round.

    The first round has all, later ones none of the eager cases, which only show scale; then come
    the extra rounds.
    """
    everything = list(range(len(cases)))
    main = [n for n in everything if cases[n].kind != "eager"]
    pair = [n for n in main if cases[n].num_exits == 0]
    return [everything] + [main] * (0 if quick else rounds - 1) + [pair] * EXTRA_ROUNDS


def _times(
    shape: str, cases: list[Case], options: argparse.Namespace
) -> tuple[list[dict[int, tuple[float, float]]], int]:
    """Return {round: (seconds, CPU seconds)} of each case, and torch's count for the plain one."""
    show_progress(f"shape {shape}: starting {len(cases)} models")
    workers = [worker for group in _groups(cases) for worker in _start(shape, group, options)]
    workers[0].request("flops")
    counted = workers[0].answer()
    times: list[dict[int, tuple[float, float]]] = [{} for _ in cases]
    turns = _turns(cases, options.quick, options.rounds)
    for number, turn in enumerate(turns):
        for index in turn:
            show_progress(f"shape {shape}: round {number + 1} of {len(turns)}, {cases[index].name}")
            times[index][number] = workers[index].step()[:2]
    for worker in workers:
        worker.stop()
    return times, counted


def measure_shape(shape: str, cases: list[Case], options: argparse.Namespace) -> ShapeResult:
    """Return what was measured of a shape."""
    peaks = _peaks(shape, cases, options) if shape in MEMORY_SHAPES else [None] * len(cases)
    times, counted = _times(shape, cases, options)
    show_progress("")
    flops = [
        step_flops(case_settings(shape, case, options.device, options.bf16), case.num_exits + 1)
        for case in cases
    ]
    return ShapeResult(list(map(Measured, cases, times, peaks, flops)), counted)
