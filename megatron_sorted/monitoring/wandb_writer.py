"""Reports for Weights & Biases, which may be slow, unreachable or not there at all, and training does not notice.

``write`` puts a report into a short queue. One thread takes it out and hands it to a process (`wandb_process`) that imports wandb,
opens the run and logs. Whatever that process does, the queue is bounded and the process can be ended.
"""

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.monitoring import wandb_process
from megatron_sorted.monitoring.values import metric_values
from megatron_sorted.monitoring.writer import Report, Writer
from megatron_sorted.settings.run import Settings

QUEUED_REPORTS = 1000
"""Kept while wandb is slow; of more, the oldest are dropped. A report is a few kilobytes."""
INIT_SECONDS = 20.0
"""Given to the server to answer; then the run goes on offline."""
START_SECONDS = 60.0
"""Given to the whole start: importing wandb from a slow file system comes before the server."""
FINISH_SECONDS = 12.0
"""Given to the upload of what is left."""
CLOSE_SECONDS = 20.0
"""Longest that ``close`` takes."""
OFFLINE_SECONDS = 8.0
"""Of those, kept for writing the run offline where the server did not answer in time."""


class Unusable(Exception):
    """wandb cannot be used in the way tried; the message says why, for the user."""


@dataclass(frozen=True)
class WandbPlan:
    """What to open: the settings, over which wandb's own environment variables go.

    Attributes:
        mode: online, offline or disabled.
        init: Arguments of ``wandb.init``, without the mode.
        directory: Where wandb makes its directory ``wandb``.
    """

    mode: str
    init: dict[str, Any]
    directory: Path


def wandb_plan(settings: Settings, run_id: str, description: dict[str, Any], environment: Mapping[str, str]) -> WandbPlan:
    """Returns what to open for a run that has ``--wandb-project``."""
    def chosen(variable: str, value: str | None) -> str | None:
        return environment.get(variable) or value

    mode = chosen("WANDB_MODE", settings.wandb_mode)
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # wandb's older words
    directory = Path(chosen("WANDB_DIR", settings.wandb_save_dir) or settings.save or ".")
    name = Path(settings.save).resolve().name if settings.save else None
    return WandbPlan(mode, {
        "id": chosen("WANDB_RUN_ID", run_id),
        "project": chosen("WANDB_PROJECT", settings.wandb_project),
        "name": chosen("WANDB_NAME", settings.wandb_exp_name or name),
        "entity": chosen("WANDB_ENTITY", settings.wandb_entity),
        "group": chosen("WANDB_RUN_GROUP", settings.wandb_group),
        "resume": chosen("WANDB_RESUME", "allow"),
        "dir": str(directory),
        "config": description,
    }, directory)


class _Process:
    """One try: a process that opens the run in one mode."""

    def __init__(self, plan: WandbPlan, mode: str):
        self.plan, self.mode = plan, mode
        self._before = self._directories()
        self._answers = b""
        # the mode is chosen here; its own session: the signals of a terminal and of torchrun are for training
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
        self._process = subprocess.Popen(
            [sys.executable, wandb_process.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, start_new_session=True)
        self.send({"mode": mode, "init": plan.init, "program": sys.argv[0], "trainer": os.getpid(),
                   "init_seconds": INIT_SECONDS, "finish_seconds": FINISH_SECONDS})

    def _directories(self) -> set[Path]:
        return set((self.plan.directory / "wandb").glob(f"run-*-{self.plan.init['id']}"))

    def send(self, message: dict[str, Any]) -> None:
        """Hands a message over; waits while the process does not read.

        Raises:
            OSError: the process is gone.
        """
        rest = memoryview(json.dumps(message).encode() + b"\n")
        while rest:
            rest = rest[os.write(self._process.stdin.fileno(), rest):]

    def answer(self, deadline: Callable[[], float]) -> dict[str, Any]:
        """Returns the next answer.

        Raises:
            Unusable: there was none in time, or it is a failure.
        """
        while b"\n" not in self._answers:
            if time.monotonic() > deadline():
                raise Unusable("no answer in time")
            if select.select([self._process.stdout], [], [], 0.1)[0]:
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    raise Unusable("its process ended")
                self._answers += data
        line, _, self._answers = self._answers.partition(b"\n")
        answer = json.loads(line)
        if "failed" in answer:
            if answer["failed"]["missing"]:
                raise Unusable(f"{answer['failed']['reason']}; `pip install wandb` installs it")
            raise Unusable(answer["failed"]["reason"])
        return answer

    def failure(self) -> str:
        """Returns why the process ended."""
        try:
            return str(self.answer(lambda: time.monotonic() + 1.0))
        except Unusable as error:
            return str(error)

    def end(self, forget: bool = False) -> None:
        """Ends the process if it still runs; with ``forget``, removes what a run that was never opened left behind."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        if forget:
            for directory in self._directories() - self._before:
                shutil.rmtree(directory, ignore_errors=True)


class Wandb(Writer):
    """Sends reports to one run of Weights & Biases: one from one rank, continued after a resume.

    Args:
        plan: What to open.
        last_depth: The depth whose loss is ``lm loss``.
    """

    name = "wandb"

    def __init__(self, plan: WandbPlan, last_depth: int):
        self.plan, self.last_depth = plan, last_depth
        self._main_set: str | None = None
        self._notes: list[str] = []
        self._queue: deque[dict[str, Any]] = deque()
        self._changed = threading.Condition()
        self._closing_at: float | None = None
        self._ended = False
        self._dropped = 0
        self._directory: str | None = None
        self._process: _Process | None = None
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)

    def start(self) -> None:
        """Starts the thread; returns at once."""
        self._thread.start()

    def write(self, report: Report) -> None:
        """Queues one report; returns at once."""
        if self._main_set is None:
            self._main_set = getattr(report, "name", None)
        row = {"iteration": report.step, "values": metric_values(report, self.last_depth, self._main_set)}
        with self._changed:
            if self._ended:
                return
            self._queue.append(row)
            if len(self._queue) > QUEUED_REPORTS:
                self._queue.popleft()
                self._dropped += 1
            self._changed.notify()

    def notes(self) -> list[str]:
        """Returns what to tell the user since the last call."""
        with self._changed:
            notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Sends what is queued and finishes the run; after `CLOSE_SECONDS` what is left stays behind."""
        with self._changed:
            self._closing_at = time.monotonic()
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._note(f"wandb: did not finish within {CLOSE_SECONDS:.0f} s.{self._remedy()}")
            process = self._process
            if process is not None:
                process.end()  # which ends the thread
            self._thread.join(1.0)
        with self._changed:
            self._dropped += len(self._queue)
            self._queue.clear()
            self._ended = True
            if self._dropped and self._directory:
                self._notes.append(f"wandb: it was too slow, {self._dropped} reports are missing there; the JSON lines hold them")

    def _note(self, line: str) -> None:
        with self._changed:
            self._notes.append(line)

    def _remedy(self) -> str:
        return f" Send the rest later: wandb sync {self._directory}" if self._directory else ""

    def _work(self) -> None:
        """Opens the run, online if that works, and hands over the queue."""
        try:
            self._open()
            try:
                self._hand_over()
            except Unusable as error:
                if self._process.mode == "offline" or self._closing_at is not None:
                    raise
                self._note(f"wandb: stopped ({error}).{self._remedy()}")
                self._process.end()
                self._directory = None
                self._try("offline")
                self._note(f"wandb: going on offline. Send the run later: wandb sync {self._directory}")
                self._hand_over()
        except Exception as error:  # whatever it is, training goes on
            reason = wandb_process.reason_of(error)
            self._note(f"wandb: {'stopped' if self._directory else 'not used'} ({reason}). Training goes on without it." + self._remedy())
        finally:
            with self._changed:
                self._ended = True
                if not self._directory:
                    self._queue.clear()
            if self._process is not None:
                self._process.end()

    def _open(self) -> None:
        modes = ("offline", "online", "disabled")
        why = None if self.plan.mode in modes else f"WANDB_MODE: {self.plan.mode!r} is none of {', '.join(modes)}"
        if self.plan.mode == "online":
            try:
                started = self._try("online")
                self._note(f"wandb: run {started['name']} ({self.plan.init['id']}){' continued' * started['resumed']}, {started['url']}")
                return
            except (Unusable, OSError) as error:
                why = str(error)
                if self._process is not None:
                    self._process.end(forget=True)
        started = self._try("offline")
        self._note(f"wandb: {'offline' if why is None else f'not online ({why}), going on offline'}. "
                   f"Send the run later: wandb sync {self._directory}")

    def _try(self, mode: str) -> dict[str, Any]:
        begun = time.monotonic()

        def deadline() -> float:
            if self._closing_at is None:
                return begun + START_SECONDS
            reserve = OFFLINE_SECONDS if mode == "online" else 1.0
            return min(begun + START_SECONDS, self._closing_at + CLOSE_SECONDS - reserve)

        self._process = None
        self._process = _Process(self.plan, mode)
        started = self._process.answer(deadline)["started"]
        self._directory = started["directory"]
        return started

    def _hand_over(self) -> None:
        process = self._process
        while True:
            with self._changed:
                while not self._queue and self._closing_at is None:
                    self._changed.wait()
                row = self._queue.popleft() if self._queue else None
            try:
                process.send(row or {"close": True})
            except OSError as error:
                raise Unusable(process.failure()) from error
            if row is None:
                break
        complete = process.answer(lambda: self._closing_at + CLOSE_SECONDS)["finished"]["complete"]
        if not complete:
            self._note(f"wandb: could not send all within {FINISH_SECONDS:.0f} s.{self._remedy()}")
