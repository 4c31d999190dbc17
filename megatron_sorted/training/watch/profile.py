"""Some steps recorded by torch.profiler, on request."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import profile, supported_activities

from megatron_sorted.files import write_text_atomically
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step_result import TrainedStep

TABLE_ROWS = 40


class Profiler:
    """A recorder of steps ``profile_step_start`` to ``profile_step_end`` - 1.

    Steps are numbered as in reports: the first is 1. A failure is logged and ends the recording,
    never the run.

    Args:
        settings: The run.
        rank: The rank of this process; only ``profile_ranks`` record.
        directory: The directory for recordings; None if the run names none.
        log: A function that prints a line for the user, called on recording ranks.
    """

    def __init__(
        self,
        settings: Settings,
        rank: int,
        directory: str | Path | None,
        log: Callable[[str], None],
    ):
        self._wanted = settings.profile and directory is not None and rank in settings.profile_ranks
        self._start, self._end = settings.profile_step_start, settings.profile_step_end
        self._rank, self._log = rank, log
        self._directory = Path(directory) if directory is not None else Path()
        self._recording: profile | None = None
        self._first = self._done = 0

    def after(self, step: TrainedStep) -> None:
        """Start or end the recording, after a step."""
        self.step(step.number)

    def step(self, done: int) -> None:
        """Start or end the recording; call it before the first step and after every step.

        Args:
            done: Number of steps done so far.
        """
        if not self._wanted:
            return
        try:
            if self._recording is not None:
                self._done = done
                self._recording.step()
                if done + 1 >= self._end:
                    self._finish()
            elif self._start <= done + 1 < self._end:
                self._begin(done + 1)
        except Exception as error:  # a recording must not end the run
            self._give_up(error)

    def close(self) -> None:
        """Write the recording if the run ends before ``profile_step_end``."""
        if self._recording is not None:
            try:
                self._finish()
            except Exception as error:  # as above
                self._give_up(error)

    def _begin(self, step: int) -> None:
        self._recording = profile(activities=supported_activities(), record_shapes=True)
        self._first = self._done = step
        self._recording.start()

    def _finish(self) -> None:
        recording, self._recording, self._wanted = self._recording, None, False
        recording.stop()
        name = f"rank_{self._rank}_steps_{self._first}-{self._done}"
        self._directory.mkdir(parents=True, exist_ok=True)
        recording.export_chrome_trace(str(self._directory / f"{name}.json.gz"))
        averages = recording.key_averages()
        on_device = any(event.self_device_time_total for event in averages)
        key = "self_device_time_total" if on_device else "self_cpu_time_total"
        table = averages.table(sort_by=key, row_limit=TABLE_ROWS, max_name_column_width=80)
        write_text_atomically(
            self._directory / f"{name}.txt", f"torch {torch.__version__}\n{table}\n"
        )
        self._log(
            f"profile: wrote {self._directory / name}.json.gz (open in ui.perfetto.dev) "
            f"and {name}.txt"
        )

    def _give_up(self, error: Exception) -> None:
        self._wanted, self._recording = False, None
        self._log(f"profile: given up, training continues: {type(error).__name__}: {error}")
