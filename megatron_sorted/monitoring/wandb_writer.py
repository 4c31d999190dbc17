"""Reports for Weights & Biases, which may be slow or unreachable without delaying training.

``write`` puts a report into a short queue and sends as much of it to a process (``wandb_process``)
as that accepts without waiting. The process imports wandb, opens the run and logs; whatever it
does, the queue is bounded and the process can be ended.
"""

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.installation import own_module
from megatron_sorted.monitoring.values import metric_values
from megatron_sorted.monitoring.writer import Report, ReportWriter
from megatron_sorted.settings.run import Settings

QUEUED_REPORTS = 1000
"""Largest length of the queue; the oldest reports are dropped. A report is a few kilobytes."""
INIT_SECONDS = 20.0
"""Time for the server to answer; then the run continues offline."""
START_SECONDS = 60.0
"""Time for the whole start, which begins with the import of wandb from a perhaps slow disk."""
FINISH_SECONDS = 12.0
"""Time to upload the rest."""
CLOSE_SECONDS = 20.0
"""Longest time that ``close`` takes."""
OFFLINE_SECONDS = 8.0
"""Part of ``CLOSE_SECONDS`` kept to write the run offline if the server does not answer in time."""
MODES = ("offline", "online", "disabled")


@dataclass(frozen=True)
class WandbPlan:
    """The run to open: the settings, overridden by wandb's own environment variables.

    Attributes:
        mode: online, offline or disabled.
        init: Arguments of ``wandb.init``, without the mode.
        directory: The folder in which wandb creates its directory ``wandb``.
    """

    mode: str
    init: dict[str, Any]
    directory: Path


def wandb_plan(
    settings: Settings, run_id: str, description: dict[str, Any], environment: Mapping[str, str]
) -> WandbPlan:
    """Return the run to open for settings with ``--wandb-project``."""

    def chosen(variable: str, value: str | None) -> str | None:
        return environment.get(variable) or value

    mode = chosen("WANDB_MODE", settings.wandb_mode)
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # wandb's older names
    directory = Path(chosen("WANDB_DIR", settings.wandb_save_dir) or settings.save or ".")
    name = Path(settings.save).resolve().name if settings.save else None
    return WandbPlan(
        mode,
        {
            "id": chosen("WANDB_RUN_ID", run_id),
            "project": chosen("WANDB_PROJECT", settings.wandb_project),
            "name": chosen("WANDB_NAME", settings.wandb_exp_name or name),
            "entity": chosen("WANDB_ENTITY", settings.wandb_entity),
            "group": chosen("WANDB_RUN_GROUP", settings.wandb_group),
            "resume": chosen("WANDB_RESUME", "allow"),
            "dir": str(directory),
            "config": description,
        },
        directory,
    )


class _Process:
    """A process that opens the run in one mode; no method waits for it.

    Attributes:
        mode: online or offline.
        started: The answer to the opening of the run; None before.
        deadline: Time by which that answer must come.
    """

    def __init__(self, plan: WandbPlan, mode: str):
        self.mode, self.started, self.deadline = mode, None, time.monotonic() + START_SECONDS
        self._plan = plan
        self._before = self._directories()
        self._answers, self._unsent = b"", b""
        command, environment = own_module("megatron_sorted.monitoring.wandb_process")
        environment.pop("WANDB_MODE", None)  # the mode is chosen here
        # its own session: the signals of a terminal and of torchrun are for training
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self.pipes = self._process.stdin.fileno(), self._process.stdout.fileno()
        for pipe in self.pipes:
            os.set_blocking(pipe, False)
        self.send(
            {
                "mode": mode,
                "init": plan.init,
                "program": sys.argv[0],
                "init_seconds": INIT_SECONDS,
                "finish_seconds": FINISH_SECONDS,
            }
        )

    def _directories(self) -> set[Path]:
        return set((self._plan.directory / "wandb").glob(f"run-*-{self._plan.init['id']}"))

    def send(self, message: dict[str, Any] | None = None) -> bool:
        """Send as much as the process accepts; return whether another message may follow.

        Messages to a process that has ended are dropped.
        """
        self._unsent += b"" if message is None else json.dumps(message).encode() + b"\n"
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self.pipes[0], self._unsent) :]
        except BlockingIOError:
            return False
        except OSError:
            self._unsent = b""
        return True

    def answer(self) -> dict[str, Any] | None:
        """Return the next answer; {"failed": reason} when the process ended; None while waiting."""
        with contextlib.suppress(BlockingIOError):
            while b"\n" not in self._answers:
                data = os.read(self.pipes[1], 1 << 16)
                if not data:
                    return {"failed": "its process ended"}
                self._answers += data
        if b"\n" not in self._answers:
            return None
        line, _, self._answers = self._answers.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        """End the process if it runs; delete the directory of a run that was never opened."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        for directory in self._directories() - self._before if self.started is None else ():
            shutil.rmtree(directory, ignore_errors=True)


class Wandb(ReportWriter):
    """A writer to one run of Weights & Biases, which is continued after a resume.

    Args:
        plan: The run to open.
        last_depth: The depth whose loss is ``lm loss``.
    """

    name = "wandb"

    def __init__(self, plan: WandbPlan, last_depth: int):
        self.plan, self.last_depth = plan, last_depth
        self._main_set: str | None = None
        self._notes: list[str] = []
        self._queue: deque[dict[str, Any]] = deque()
        self._process: _Process | None = None
        self._offline = (
            "offline"
            if plan.mode in MODES
            else (
                f"not online (WANDB_MODE: {plan.mode!r} is none of {', '.join(MODES)}), "
                "continuing offline"
            )
        )
        self._closing_at: float | None = None
        self._dropped, self._remedy = 0, ""

    def start(self) -> None:
        """Start wandb's process; return at once."""
        self._open("online" if self.plan.mode == "online" else "offline")

    def write(self, report: Report) -> None:
        """Queue one report and send what wandb accepts; return at once."""
        if self._process is None:
            return
        if self._main_set is None:
            self._main_set = getattr(report, "name", None)
        self._queue.append(
            {
                "iteration": report.step,
                "values": metric_values(report, self.last_depth, self._main_set),
            }
        )
        if len(self._queue) > QUEUED_REPORTS:
            self._queue.popleft()
            self._dropped += 1
        self._advance()

    def notes(self) -> list[str]:
        """Return new lines for the user."""
        self._advance()
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Send the queue and finish the run; drop the rest after ``CLOSE_SECONDS``."""
        self._closing_at = time.monotonic()
        self._queue.append({"close": True})
        while self._process is not None and time.monotonic() < self._closing_at + CLOSE_SECONDS:
            self._advance()
            if self._process is not None:
                select.select(self._process.pipes[1:], (), (), 0.05)
        if self._process is not None:
            self._notes.append(f"wandb: did not finish within {CLOSE_SECONDS:.0f} s.{self._remedy}")
            self._leave()
        self._dropped += sum("values" in row for row in self._queue)
        if self._dropped and self._remedy:
            self._notes.append(
                f"wandb: it was too slow, {self._dropped} reports are missing there; "
                "the JSON lines hold them"
            )

    def _open(self, mode: str) -> None:
        self._process = None
        try:
            self._process = _Process(self.plan, mode)
        except OSError as error:
            self._notes.append(f"wandb: not used ({error}). Training continues without it.")

    def _leave(self) -> None:
        self._process.end()
        self._process = None

    def _advance(self) -> None:
        """Read answers and send the queue, as far as neither needs to wait."""
        while self._process is not None and (answer := self._process.answer()) is not None:
            if "started" in answer:
                self._take_start(answer["started"])
            elif "failed" in answer:
                self._take_failure(answer["failed"])
            else:
                if not answer["finished"]["complete"]:
                    self._notes.append(
                        f"wandb: could not send all within {FINISH_SECONDS:.0f} s.{self._remedy}"
                    )
                self._leave()
        process = self._process
        if process is None:
            return
        while process.send() and process.started is not None and self._queue:
            process.send(self._queue.popleft())
        if process.started is not None:
            return
        reserve = OFFLINE_SECONDS if process.mode == "online" else 1.0
        closing = (
            float("inf") if self._closing_at is None else self._closing_at + CLOSE_SECONDS - reserve
        )
        if time.monotonic() > min(process.deadline, closing):
            self._take_failure("no answer in time")

    def _take_start(self, started: dict[str, Any]) -> None:
        self._process.started = started
        self._remedy = f" Send the rest later: wandb sync {started['directory']}"
        if self._process.mode == "online":
            name = f"{started['name']} ({self.plan.init['id']}){' continued' * started['resumed']}"
            self._notes.append(f"wandb: run {name}, {started['url']}")
        else:
            self._notes.append(
                f"wandb: {self._offline}. Send the run later: wandb sync {started['directory']}"
            )

    def _take_failure(self, reason: str) -> None:
        """Continue offline if that is untried and the run is not closing, else without wandb."""
        process, opened = self._process, self._process.started is not None
        process.end()
        if process.mode == "offline" or (opened and self._closing_at is not None):
            what = "stopped" if opened else "not used"
            self._notes.append(
                f"wandb: {what} ({reason}). Training continues without it.{self._remedy}"
            )
            self._queue.clear()
            self._leave()
            return
        if opened:
            self._notes.append(f"wandb: stopped ({reason}).{self._remedy}")
        self._offline, self._remedy = (
            "continuing offline" if opened else f"not online ({reason}), continuing offline",
            "",
        )
        self._open("offline")
