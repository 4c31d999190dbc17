"""Times of what a run's loop does beside forward, backward and optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lab.benchmarks.tally import Tally, Times
from megatron_sorted.training.run import loop, reporting
from megatron_sorted.training.run.training_run import TrainingRun
from megatron_sorted.training.step import train_step as step

WORK = ("forward and backward", "gradients set to zero", "optimizer")
"""What any loop has to do; everything else is overhead."""
CAUSES = {
    "data": "micro-batches read and packed",
    "exits compared": "agreement with the last exit and gradient norms, after the schedule",
    "control exchange": "stop signals and ends of saves shared by all ranks",
    "sums of exits": "losses of the step added to those of the interval",
    "report": "numbers collected",
    "report's reductions": "its all-reduces over all ranks",
    "console": "lines printed",
    "writers": "JSON lines and TensorBoard",
    "watchdog marks": "signs of life",
}
"""Cause of overhead -> its description. ``tally.REST`` is everything else between two steps."""
SHARED = ("exits compared", "control exchange", "report's reductions")
"""Causes in which ranks exchange data."""


def watch_loop(run: TrainingRun, tally: Tally, at_step: Callable[[], None] = lambda: None) -> None:
    """Add the times of a started run's functions to their causes.

    ``at_step`` is called between two steps.
    """
    tally.wrap(step, "run_schedule", WORK[0])
    for chunk in run.model.chunks:
        tally.wrap(chunk, "zero_grad_buffer", WORK[1])
    tally.wrap(run.model.optimizer, "zero_grad", WORK[1])
    tally.wrap(step, "optimizer_step", WORK[2])
    tally.wrap(run.forward_step, "finish_step", "exits compared")
    tally.wrap(run.stops, "start_exchange", "control exchange")
    tally.wrap(run.stops, "answers", "control exchange")
    tally.wrap(reporting.Interval, "add", "sums of exits")
    tally.wrap(reporting.Interval, "report", "report")
    tally.wrap(reporting, "reduce_interval", "report's reductions")
    tally.wrap(run, "log", "console")
    tally.wrap(run.watchdog, "mark", "watchdog marks")
    tally.wrap(run, "save", "save")
    if run.writers:
        tally.wrap(run.writers, "write", "writers")
    make_batches, coefficients = loop.make_train_batches, loop.trained_exits

    def make_timed_batches(*arguments: Any):
        take = tally.timed("data", make_batches(*arguments).__next__)
        while True:
            yield take()

    def first_of_a_step(*arguments: Any):
        # The loop needs the step's coefficients before anything else.
        tally.next_step()
        at_step()
        return coefficients(*arguments)

    loop.make_train_batches, loop.trained_exits = make_timed_batches, first_of_a_step


def train_leg(
    run: TrainingRun, tally: Tally, num_steps: int, **settings: Any
) -> list[dict[str, Times]]:
    """Train the next steps of a run whose loop is watched; return the seconds by cause of each.

    Collective: that of the steps; every process must call it.

    Args:
        run: A started run.
        tally: The tally that watches its loop.
        num_steps: The number of steps.
        **settings: Settings of the loop to change for these steps.
    """
    tally.steps.clear()
    run.settings = dataclasses.replace(
        run.settings, train_iters=run.progress.step + num_steps, **settings
    )
    loop.train(run)
    tally.next_step()
    return tally.steps[1:]  # the first entry is what came before the first step


def measure_loop(
    run: TrainingRun, rounds: int, leg_steps: int, intervals: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Return the seconds by cause of steps at each log interval, in turns.

    The first and last step of a leg are left out, because they always report.

    Collective: that of the steps; every process must call it.
    """
    tally = Tally()
    watch_loop(run, tally)
    train_leg(run, tally, 2)
    measured = []
    for number in range(rounds):
        for interval in intervals:
            first = run.progress.step + 1
            seconds = train_leg(run, tally, leg_steps, log_interval=interval)
            measured += [
                {
                    "round": number,
                    "log_interval": interval,
                    "step": first + index,
                    "reported": (first + index) % interval == 0,
                    "seconds": seconds[index],
                }
                for index in range(1, leg_steps - 1)
            ]
    return measured
