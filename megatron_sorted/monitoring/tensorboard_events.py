"""Reports for TensorBoard in its record format; neither torch nor tensorflow is needed."""

import os
import socket
import time
from pathlib import Path

from megatron_sorted.errors import SettingsError
from megatron_sorted.monitoring.values import metric_values
from megatron_sorted.monitoring.writer import Report, ReportWriter


class TensorBoard(ReportWriter):
    """A writer of scalars over steps: every process writes a new event file into a directory.

    Args:
        directory: TensorBoard's log directory.
        last_depth: The depth whose loss is ``lm loss``.
        resumed_step: The step that the run starts from; TensorBoard discards what an earlier
            process wrote after it.
    """

    name = "TensorBoard"

    def __init__(self, directory: str | Path, last_depth: int, resumed_step: int):
        self.directory = Path(directory)
        self.last_depth, self.resumed_step = last_depth, resumed_step
        self._main_set: str | None = None
        self._records = None

    def start(self) -> None:
        """Open the event file.

        Raises:
            SettingsError: The package is missing, or the directory cannot be written.
        """
        try:
            # the package's own file writer would import tensorflow where that is installed
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise SettingsError(
                f"--tensorboard-dir: the package tensorboard cannot be imported ({error}). "
                "Install it with `pip install tensorboard`, or leave the setting out."
            ) from error
        self._events, self._summaries = event_pb2, summary_pb2
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
            path = self.directory / f"events.out.tfevents.{name}"
            self._records = RecordWriter(open(path, "ab"))  # noqa: SIM115 - close() closes it
            self._add(file_version="brain.Event:2")
            self._add(
                step=self.resumed_step + 1,
                session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
            )
            self._records.flush()
        except OSError as error:
            raise SettingsError(
                f"--tensorboard-dir: cannot write in {self.directory} ({error.strerror}). "
                "Give a directory that can be written."
            ) from error

    def _add(self, **values) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), **values).SerializeToString())

    def write(self, report: Report) -> None:
        """Write one report.

        Raises:
            OSError: The report could not be written.
        """
        if self._main_set is None:
            self._main_set = getattr(report, "name", None)
        values = metric_values(report, self.last_depth, self._main_set)
        scalars = [
            self._summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
        ]
        self._add(step=report.step, summary=self._summaries.Summary(value=scalars))
        self._records.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._records is not None:
            self._records.close()
            self._records = None
