"""All writers of a run's reports."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_sorted.monitoring.json_lines import JsonLines
from megatron_sorted.monitoring.tensorboard_events import TensorBoard
from megatron_sorted.monitoring.wandb_writer import Wandb, wandb_plan
from megatron_sorted.monitoring.writer import Report, ReportWriter
from megatron_sorted.settings.run import Settings


class Writers:
    """Several writers as one. An error of one is logged once and stops neither others nor training.

    Args:
        writers: The writers, already started.
        log: Prints a line for the user; called from the process and thread that calls the methods.
    """

    def __init__(self, writers: Sequence[ReportWriter], log: Callable[[str], None]):
        self._writers, self._log = writers, log
        self._failures = dict.fromkeys(writers, 0)
        self._log_notes()

    def write(self, report: Report) -> None:
        """Pass a report to every writer."""
        for writer in self._writers:
            self._guarded(writer, writer.write, report)
        self._log_notes()

    def close(self) -> None:
        """Close every writer and log how many reports each could not write."""
        for writer in self._writers:
            self._guarded(writer, writer.close)
        self._log_notes()
        for writer, count in self._failures.items():
            if count > 1:
                self._log(f"{writer.name}: {count} reports could not be written")
        self._writers, self._failures = (), {}

    def _guarded(self, writer: ReportWriter, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # a full disk must not end a run of a month
            self._failures[writer] += 1
            if self._failures[writer] == 1:
                self._log(
                    f"{writer.name}: a report could not be written ({error}). "
                    "Training continues, and later reports are tried"
                )

    def _log_notes(self) -> None:
        for writer in self._writers:
            for line in writer.notes():
                self._log(line)


def open_writers(
    settings: Settings,
    run_id: str,
    resumed_step: int,
    description: dict[str, Any],
    log: Callable[[str], None],
) -> Writers:
    """Start the writers that the settings name. Only the process that reports may call this.

    JSON lines are written to ``--metrics-file``, else to ``metrics.jsonl`` in ``--save``; without
    either there are none.

    Args:
        settings: The run's settings.
        run_id: An identifier that is kept with the checkpoint, so that a resumed run continues the
            same run of wandb.
        resumed_step: Number of steps before this process; 0 in a new run.
        description: Settings, versions and the like as plain data; the run's config in wandb.
        log: Prints a line for the user.

    Raises:
        SettingsError: A file or directory cannot be written, or TensorBoard's package is missing.
    """
    path = settings.metrics_file or (
        str(Path(settings.save) / "metrics.jsonl") if settings.save else None
    )
    writers: list[ReportWriter] = [JsonLines(path)] if path else []
    if settings.tensorboard_dir is not None:
        writers.append(TensorBoard(settings.tensorboard_dir, settings.num_layers, resumed_step))
    if settings.wandb_project is not None:
        plan = wandb_plan(settings, run_id, description, os.environ)
        if plan.mode != "disabled":
            writers.append(Wandb(plan, settings.num_layers))
    for writer in writers:
        writer.start()
    return Writers(writers, log)
