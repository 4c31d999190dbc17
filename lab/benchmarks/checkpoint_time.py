"""How long saves and loads take in a run, and what they do to its steps.

The same bytes are also saved by megatron-core and written by the machine alone.
"""

import dataclasses
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from lab.benchmarks.bounds import forget_cached, measure_bounds
from lab.benchmarks.loop_time import train_leg, watch_loop
from lab.benchmarks.tally import Tally
from megatron_sorted.checkpoint.candidates import find_candidates
from megatron_sorted.checkpoint.layout import iteration_directory
from megatron_sorted.checkpoint.sharding.sharded import sharded_state
from megatron_sorted.training.run.checkpoints import choose_checkpoint
from megatron_sorted.training.run.training_run import TrainingRun

INTERVAL_SHARE = 2.8
"""Steps from save to save, over those that fit into a save if both were as fast as alone.

Beside each other both are slower.
"""
STEPS_AT_LEAST = 4
STEPS_AT_MOST = 60


class CheckpointTimes:
    """The measurement of one started run, whose ``save`` is set."""

    def __init__(self, run: TrainingRun, folder: Path):
        self.run, self.folder, self.root = run, folder, Path(run.settings.save)
        self.tally = Tally()
        self.busy: list[bool] = []
        self.outcomes: list[dict[str, Any]] = []
        watch_loop(run, self.tally, lambda: self.busy.append(run.checkpoints.busy))
        self._report_outcome = run.checkpoints.report
        run.checkpoints.report = self._keep_outcome

    def _keep_outcome(self, outcome, last: bool) -> None:
        self.outcomes.append(
            {"bytes": outcome.num_bytes, "stall": outcome.stall_seconds, "seconds": outcome.seconds}
        )
        self._report_outcome(outcome, last)

    def _together(self, work: Callable[[], Any]) -> float:
        """Return the seconds of ``work``, which all ranks begin at once.

        Collective: one barrier over all ranks, then that of ``work``.
        """
        dist.barrier()
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def measure(self, rounds: int) -> dict[str, Any]:
        """Return what was measured, in seconds and bytes of this rank.

        Collective: steps, saves and loads; every process must call it.
        """
        quiet = train_leg(self.run, self.tally, STEPS_AT_LEAST)
        first = self._background()
        again = self._background()
        step_seconds = statistics.median(
            sum(wall for wall, _ in step.values()) for step in quiet[1:]
        )
        training = self._in_training(max(2, rounds), again["seconds"], step_seconds)
        measured = [self._round(number) for number in range(rounds)]
        shutil.rmtree(self.root, ignore_errors=True)
        return {"first": first, "alone": again, "training": training, "rounds": measured}

    def _background(self) -> dict[str, Any]:
        """Save in the background while the main thread only waits; return its times.

        "held" is how long the main thread was held up before it could wait.

        Collective: that of a step and a save.
        """
        train_leg(self.run, self.tally, 1)
        held = self._together(self.run.save)
        outcome = self.run.checkpoints.finished(wait=True)
        return {
            "held": held,
            "stall": outcome.stall_seconds,
            "seconds": outcome.seconds,
            "bytes": outcome.num_bytes,
        }

    def _in_training(
        self, num_saves: int, save_seconds: float, step_seconds: float
    ) -> dict[str, Any]:
        """Return steps with and without a save in the background, in turns, and the saves.

        Collective: that of steps and saves, and one all-reduce of a number.
        """
        wanted = torch.tensor(math.ceil(INTERVAL_SHARE * save_seconds / step_seconds), device="cpu")
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        interval = min(max(int(wanted), STEPS_AT_LEAST), STEPS_AT_MOST)
        first = self.run.progress.step
        num_steps = (first // interval + num_saves + 1) * interval - first
        self.busy.clear()
        self.outcomes.clear()
        steps = train_leg(self.run, self.tally, num_steps, save_interval=interval)
        self.busy.append(self.run.checkpoints.busy)
        if (outcome := self.run.checkpoints.finished(wait=True)) is not None:
            self.run.checkpoints.report(outcome, last=False)
        held = [step["save"][0] for step in steps if "save" in step]
        walls = [
            sum(wall for cause, (wall, _) in step.items() if cause != "save") for step in steps
        ]
        saving = [
            before if before == after else None
            for before, after in zip(self.busy, self.busy[1:], strict=False)
        ]
        measured = [
            {"seconds": wall, "saving": beside} for wall, beside in zip(walls, saving, strict=True)
        ]
        return {
            "save_interval": interval,
            "held": held,
            "outcomes": list(self.outcomes),
            "steps": measured[1:],
        }

    def _round(self, number: int) -> dict[str, Any]:
        """Measure foreground saves, megatron-core's save, the bounds and loads, one after another.

        Collective: that of saves and loads.
        """
        saver, entry = self.run.checkpoints.saver, {}
        saver.background = False
        for name, verify in (("save", True), ("save_unverified", False)):
            train_leg(self.run, self.tally, 1)
            saver.verify = verify
            self.outcomes.clear()
            entry[name] = self._together(self.run.save)
            entry["bytes"] = self.outcomes[-1]["bytes"]
        saver.background = saver.verify = True
        entry["core"] = self._core(number)
        entry["bounds"] = {}
        self._together(
            lambda: entry["bounds"].update(
                measure_bounds(self.folder, entry["bytes"] // dist.get_world_size())
            )
        )
        for name, verify in (("load", True), ("load_unverified", False)):
            entry[name] = self._load(verify)
        return entry

    def _state(self) -> dict[str, Any]:
        model = self.run.model
        return sharded_state(
            model.chunks,
            model.optimizer,
            model.schedule,
            {"coefficient_rule": self.run.rule.state_dict()},
        )

    def _core(self, number: int) -> float:
        """Return the seconds of megatron-core's own save of the same state.

        Collective: that of a save, and two barriers.
        """
        directory = self.folder / f"core_{number}"
        if dist.get_rank() == 0:
            directory.mkdir()
        seconds = self._together(lambda: dist_checkpointing.save(self._state(), str(directory)))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(directory)
        return seconds

    def _load(self, verify: bool) -> float:
        """Return the seconds from looking for a checkpoint to continuing from it, uncached.

        Collective: that of a load.
        """
        run = self.run
        settings = dataclasses.replace(run.settings, load=str(self.root), verify_checkpoint=verify)
        newest = iteration_directory(self.root, run.progress.step)
        forget_cached([path for path in newest.rglob("*") if path.is_file()])
        for part in getattr(run.model.optimizer, "chained_optimizers", [run.model.optimizer]):
            part.optimizer.state.clear()  # as before the first step

        def load() -> None:
            candidate = choose_checkpoint(
                find_candidates(self.root), settings, run.inputs.tokenizer, run.inputs.data, run.log
            )
            run.progress = run.checkpoints.load(candidate)

        return self._together(load)
