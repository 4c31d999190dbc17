"""A process of a run that is measured: ``python -m lab.benchmarks.run_worker JOB.json``, alone or under torchrun."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from megatron_sorted.platform.processes import read_world_of_training, silence_library_warnings
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import check_settings


def measure(job: dict[str, Any]) -> Any:
    """Return what the job asks for, measured on this rank.

    Collective: a run; every process must call it.

    Args:
        job: "kind", "words" (the run's command line), "folder", "rounds", "leg_steps", "intervals".
    """
    settings = load_settings(job["words"])
    check_settings(settings, read_world_of_training(os.environ).size)
    silence_library_warnings()
    logging.disable(
        logging.WARNING
    )  # of Megatron, on CPU: one random state serves where it expects two
    from megatron_sorted.training.run.start import prepare
    from megatron_sorted.training.run.training_run import TrainingRun

    run = TrainingRun(prepare(settings))
    if job["kind"] == "loop":
        from lab.benchmarks.loop_time import measure_loop

        found = measure_loop(run, job["rounds"], job["leg_steps"], tuple(job["intervals"]))
    else:
        from lab.benchmarks.checkpoint_time import CheckpointTimes

        found = CheckpointTimes(run, Path(job["folder"])).measure(job["rounds"])
    run.leave()
    return found


def main() -> None:
    """Measure, and writes the numbers of this rank to ``rank_N.json`` in the job's folder."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = measure(job)
    path = Path(job["folder"]) / f"rank_{os.environ.get('RANK', 0)}.json"
    path.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
