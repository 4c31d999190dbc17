"""Why a run ends before its last step, decided by all ranks at the same step, and the file by which a job script knows it."""

import json
import time
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sorted.files import write_text_atomically
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.watch.signals import signal_name, stop_request
from megatron_sorted.training.watch.trained_step import Flags

STOPPED = "stopped.json"


class Stops:
    """Asks once a step whether to stop, while the optimizer works: nobody waits for the answer.

    Args:
        settings: Of the run.
        platform: Where it runs.
        started: ``time.monotonic()`` at the start of the run.
    """

    def __init__(self, settings: Settings, platform: Platform, started: float):
        """Make a group for the exchanges.

        Collective: creates a process group of all ranks; every process must.
        """
        self.settings, self.started = settings, started
        self._group = dist.new_group(backend=platform.host_backend)
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def start_exchange(self, save_busy: bool) -> None:
        """Begin to tell the other ranks whether this one is to stop.

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
        self._pending = (
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True),
            values,
        )

    def answers(self) -> Flags:
        """Return the largest value of each flag over all ranks.

        Collective: completes the all-reduce that ``start_exchange`` has started.
        """
        assert self._pending is not None, "no exchange was started"
        (work, values), self._pending = self._pending, None
        work.wait()
        return Flags(*values.tolist())

    def reason(self, flags: Flags, step: int) -> str | None:
        """Return why the run stops after ``step``, or None if it goes on; the same on all ranks."""
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
    """Write SAVE/stopped.json, by which a job script knows that the run is to be started again."""
    word = {"step": step, "train_iters": train_iters, "reason": reason}
    write_text_atomically(Path(save) / STOPPED, json.dumps(word) + "\n")


def remove_stop_file(save: str) -> None:
    """Remove SAVE/stopped.json of the run before."""
    (Path(save) / STOPPED).unlink(missing_ok=True)
