"""A process of a measured run: ``python -m lab.benchmarks.run_worker JOB.json``."""

import logging
import os
from pathlib import Path
from typing import Any

from lab.benchmarks.jobs import do_job
from megatron_sorted.platform.processes import read_world_of_training, silence_library_warnings
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import check_settings


def measure(job: dict[str, Any]) -> Any:
    """Return what the job measures on this rank.

    Collective: a run; every process must call it.

    Args:
        job: "kind", "arguments" (of the run), "rounds", "leg_steps", "intervals".
    """
    settings = load_settings(job["arguments"])
    check_settings(settings, read_world_of_training(os.environ).size)
    silence_library_warnings()
    # On a CPU, Megatron warns that one random state serves where it expects two.
    logging.disable(logging.WARNING)
    from megatron_sorted.training.run.start import prepare
    from megatron_sorted.training.run.training_run import TrainingRun

    run = TrainingRun(prepare(settings))
    if job["kind"] == "loop":
        from lab.benchmarks.loop_time import measure_loop

        numbers = measure_loop(run, job["rounds"], job["leg_steps"], tuple(job["intervals"]))
    else:
        from lab.benchmarks.checkpoint_time import CheckpointTimes

        numbers = CheckpointTimes(run, Path.cwd()).measure(job["rounds"])
    run.leave()
    return numbers


if __name__ == "__main__":
    do_job(measure)
