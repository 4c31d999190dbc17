"""Kill a run at random moments and start it again until it is finished."""

import contextlib
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil

from lab.reliability.task import RunningJob
from megatron_sorted.monitoring.json_lines import read_json_lines

VICTIMS = ("one rank", "all ranks", "all ranks and torchrun")
POLL_SECONDS = 0.002


class Killer:
    """Kills a job ``kills`` times during its ``steps`` steps.

    The kills are spread over the steps: each waits until the run has reported a step for the first
    time, and then for a random moment of the next steps or for the next save.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        num_processes: int,
        kills: int,
        settings: list[str],
        chance: random.Random,
    ):
        self.steps, self.kills, self.chance = steps, kills, chance
        self._start = partial(
            RunningJob, folder, "killed", steps, num_processes, settings, max_restarts=kills
        )
        self.save = folder / "killed"
        self.counts: Counter[str] = Counter()
        self.lost_steps = 0

    def run(self) -> None:
        """Kill the run and start it again until it is finished."""
        job = self._start()
        for number in range(self.kills):
            step = round((number + 1) * (self.steps - 3) / (self.kills + 1))
            victims = VICTIMS[number % len(VICTIMS)]
            self._wait_for_step(job, step)
            in_save = self._wait_for_moment(job, wants_save=self.chance.random() < 0.5)
            before = self._last_step()
            saved = max((int(path.name[5:]) for path in self.save.glob("iter_*")), default=0)
            self._kill(job, victims)
            self.counts["kills"] += 1
            self.counts[f"kills of {victims}"] += 1
            self.counts["kills in the middle of a save"] += in_save
            self.lost_steps += before - saved
            print(
                f"  kill {number + 1} of {self.kills}: {victims}, at step {before}"
                f"{', in the middle of a save' * in_save}",
                flush=True,
            )
            if victims == VICTIMS[2]:
                job = self._start()
        job.wait_until_finished(seconds=300 + 5 * self.steps)
        self.counts["restarts by torchrun itself"] = (
            self.counts["kills"] - self.counts[f"kills of {VICTIMS[2]}"]
        )

    def figures(self) -> dict[str, int]:
        """Return the numbers of kills, restarts and repeated steps."""
        return {**self.counts, "steps": self.steps, "steps done again": self.lost_steps}

    def _last_step(self) -> int:
        path = self.save / "metrics.jsonl"
        lines = read_json_lines(path) if path.exists() else []
        return next((line["step"] for line in reversed(lines) if line["kind"] == "train"), 0)

    def _wait_for_step(self, job: RunningJob, step: int) -> None:
        """Wait until the run is at ``step`` or beyond, and trains."""
        path, until = self.save / "metrics.jsonl", time.monotonic() + 300
        seen = path.stat().st_size if path.exists() else 0
        while not (path.exists() and path.stat().st_size > seen and self._last_step() >= step):
            if job.finished() or time.monotonic() > until:
                raise RuntimeError(
                    f"the run did not reach step {step}; the end of {job.log}:\n"
                    f"{job.log.read_text()[-3000:]}"
                )
            time.sleep(0.01)

    def _wait_for_moment(self, job: RunningJob, wants_save: bool) -> bool:
        """Wait for the moment to kill; return whether it is in the middle of a save."""
        until = time.monotonic() + (10 if wants_save else self.chance.uniform(0, 0.4))
        while time.monotonic() < until and not (wants_save and self._saving()):
            if job.finished():
                raise RuntimeError("the run was finished before all kills; give it more --steps")
            time.sleep(POLL_SECONDS)
        if wants_save:
            time.sleep(self.chance.uniform(0, 0.08))
        return self._saving()

    def _saving(self) -> bool:
        return any(self.save.glob(".iter_*.writing"))

    def _kill(self, job: RunningJob, victims: str) -> None:
        ranks = job.ranks()
        chosen = ranks[:] if victims != VICTIMS[0] else [self.chance.choice(ranks)]
        for process in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if victims == VICTIMS[2]:
            job.kill()
