"""Stops before the last step, decided by all ranks at the same step.

A file tells the job script that the run has not finished.
"""

import json
import time
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sorted.files import write_text_atomically
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step_result import Flags
from megatron_sorted.training.watch.signals import signal_name, stop_request

STOPPED = "stopped.json"


class Stops:
    """The question whether to stop, exchanged once a step while the optimizer works.

    No rank waits for the answer.

    Args:
        settings: The run.
        platform: The devices of the run.
        started: ``time.monotonic()`` at the start of the run.
    """

    def __init__(self, settings: Settings, platform: Platform, started: float):
        """Create a group for the exchanges.

        Collective: creates a process group of all ranks; every process must.
        """
        self.settings, self.started = settings, started
        self._group = dist.new_group(backend=platform.host_backend)
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def start_exchange(self, save_busy: bool) -> None:
        """Start to exchange with the other ranks whether this one is to stop.

        Collective: starts one small all-reduce, which ``answers`` completes.
        """
        limit = self.settings.exit_duration_in_mins
        flags = Flags(
            stop_signal=stop_request.number,
            save_busy=int(save_busy),
            time_is_up=int(limit is not None and time.monotonic() - self.started > 60 * limit),
        )
        values = torch.tensor(
            [getattr(flags, field.name) for field in fields(Flags)], dtype=torch.int32, device="cpu"
        )
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = work, values

    def answers(self) -> Flags:
        """Return the largest value of each flag over all ranks.

        Collective: completes the all-reduce that ``start_exchange`` has started.
        """
        assert self._pending is not None, "no exchange was started"
        (work, values), self._pending = self._pending, None
        work.wait()
        return Flags(*values.tolist())

    def reason(self, flags: Flags, step: int) -> str | None:
        """Return why the run stops after ``step``, the same on all ranks; None if it continues."""
        settings = self.settings
        if step == settings.train_iters:
            return None
        if flags.stop_signal:
            return signal_name(flags.stop_signal)
        if flags.time_is_up:
            return f"--exit-duration-in-mins {settings.exit_duration_in_mins:g}"
        if settings.exit_interval and step % settings.exit_interval == 0:
            return f"--exit-interval {settings.exit_interval}"
        return None


def write_stop_file(save: str, step: int, train_iters: int, reason: str) -> None:
    """Write SAVE/stopped.json, which tells a job script to start the run again."""
    stop = {"step": step, "train_iters": train_iters, "reason": reason}
    write_text_atomically(Path(save) / STOPPED, json.dumps(stop) + "\n")


def remove_stop_file(save: str) -> None:
    """Remove the SAVE/stopped.json of an earlier start."""
    (Path(save) / STOPPED).unlink(missing_ok=True)
