"""All places that the reports of a run go to."""

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
    """Several writers as one. An error of one is said once and stops neither the others nor training.

    Args:
        writers: Already started.
        say: Prints lines for the user; called from the process and thread that calls the methods.
    """

    def __init__(self, writers: Sequence[ReportWriter], say: Callable[..., None]):
        self._writers, self._say = writers, say
        self._failures = dict.fromkeys(writers, 0)
        self._tell()

    def write(self, report: Report) -> None:
        """Give a report to every writer."""
        for writer in self._writers:
            self._guarded(writer, writer.write, report)
        self._tell()

    def close(self) -> None:
        """Close every writer and says what could not be written."""
        for writer in self._writers:
            self._guarded(writer, writer.close)
        self._tell()
        for writer, count in self._failures.items():
            if count > 1:
                self._say(f"{writer.name}: {count} reports could not be written")
        self._writers, self._failures = (), {}

    def _guarded(self, writer: ReportWriter, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # a full disk must not end a run of a month
            self._failures[writer] += 1
            if self._failures[writer] == 1:
                self._say(
                    f"{writer.name}: a report could not be written ({error}). Training goes on, later ones are tried"
                )

    def _tell(self) -> None:
        for writer in self._writers:
            for line in writer.notes():
                self._say(line)


def open_writers(
    settings: Settings,
    run_id: str,
    resumed_step: int,
    description: dict[str, Any],
    say: Callable[..., None],
) -> Writers:
    """Return the writers that the settings ask for, started. Only the process that reports may call it.

    JSON lines go to ``--metrics-file``, else to ``metrics.jsonl`` in ``--save``; without both there are none.

    Args:
        settings: of the run.
        run_id: kept with the checkpoint, so that a resume continues the same run of wandb.
        resumed_step: steps done before this process; 0 in a new run.
        description: settings, versions and the like, plain data; the run's config in wandb.
        say: prints lines for the user.

    Raises:
        SettingsError: a file or directory cannot be written, or TensorBoard's package is missing.
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
    return Writers(writers, say)
