"""Why a run ends before its last step, decided by all ranks at the same step, and the word it leaves."""

import json
import time
from pathlib import Path

from megatron_sorted.files import write_text_atomically
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.control import Control, Flags
from megatron_sorted.training.signals import signal_name, stop_request

STOPPED = "stopped.json"


class Stops:
    """Asks once a step whether to stop.

    Args:
        settings: Of the run.
        platform: Where it runs.
        started: ``time.monotonic()`` at the start of the run.
    """

    def __init__(self, settings: Settings, platform: Platform, started: float):
        """Makes the exchange.

        Collective: creates a process group of all ranks; every process must.
        """
        self.settings, self.started, self.control = settings, started, Control(platform)

    def ask_around(self, save_busy: bool) -> None:
        """Tells the other ranks what this one was told.

        Collective: starts one small all-reduce, which ``answers`` completes.
        """
        limit = self.settings.exit_duration_in_mins
        self.control.start(Flags(stop_signal=stop_request.number, save_busy=int(save_busy),
                                 time_is_up=int(limit is not None and time.monotonic() - self.started > 60 * limit)))

    def answers(self) -> Flags:
        """Returns what any rank said.

        Collective: completes the all-reduce that ``ask_around`` has started.
        """
        return self.control.finish()

    def reason(self, flags: Flags, step: int) -> str | None:
        """Returns why the run stops after ``step``, or None if it goes on; the same on all ranks."""
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


def leave_word(save: str, step: int, train_iters: int, reason: str) -> None:
    """Writes SAVE/stopped.json, by which a job script knows that the run is to be started again."""
    word = {"step": step, "train_iters": train_iters, "reason": reason}
    write_text_atomically(Path(save) / STOPPED, json.dumps(word) + "\n")


def take_word_back(save: str) -> None:
    """Removes SAVE/stopped.json of the run before."""
    (Path(save) / STOPPED).unlink(missing_ok=True)
