"""Reports as JSON lines, one object per report, readable during the run and after a kill."""

import dataclasses
import errno
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.monitoring.report import StepReport
from megatron_sorted.monitoring.writer import Report, ReportWriter
from megatron_sorted.reading.json_lines import read_blocks, records

TAIL_BYTES = 1 << 16
"""Bytes to read at a time, from the end, to find the last line."""


def finite_or_none(value: Any) -> Any:
    """Return plain data with None for numbers that JSON does not have, such as an overflown loss.

    >>> finite_or_none({"loss": float("inf"), "step": 3})
    {'loss': None, 'step': 3}
    """
    if isinstance(value, dict):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_line(report: Report) -> dict[str, Any]:
    """Return a report as plain data, with perplexities, its kind and the time."""
    values = {
        "kind": "train" if isinstance(report, StepReport) else "evaluation",
        "time": time.time(),
        **dataclasses.asdict(report),
    }
    for exits in ("exits", "averaged"):
        for depth, exit_ in getattr(report, exits, {}).items():
            values[exits][depth]["perplexity"] = exit_.perplexity
    if not values.get("averaged", True):  # not evaluated
        del values["averaged"]
    return finite_or_none(values)


class JsonLines(ReportWriter):
    """A writer that appends reports to a file; a resumed run continues the file.

    A line is one write to a file opened for appending. So it is complete, or, if the machine stops
    or the disk is full in the middle, it is the torn end of the file, which the next start moves to
    ``PATH.torn``.
    """

    name = "JSON lines"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._notes: list[str] = []
        self._file: int | None = None

    def start(self) -> None:
        """Open the file and move a torn last line to ``PATH.torn``.

        Raises:
            SettingsError: The file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(
                self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666
            )
            self._move_torn_line()
        except OSError as error:
            raise SettingsError(
                f"--metrics-file: cannot write {self.path} ({error.strerror}). "
                "Give a file that can be written."
            ) from error

    def _move_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        tail, start = b"", size
        while start and b"\n" not in tail:
            start = max(0, start - TAIL_BYTES)
            tail = os.pread(self._file, size - start, start)
        torn = tail.rpartition(b"\n")[2]
        if torn:
            with open(f"{self.path}.torn", "ab") as file:
                file.write(torn + b"\n")
            os.ftruncate(self._file, size - len(torn))
            self._notes.append(
                f"{self.path}: its last line was torn ({len(torn)} bytes) when an earlier run "
                f"ended; moved to {self.path}.torn"
            )

    def write(self, report: Report) -> None:
        """Append one report.

        Raises:
            OSError: The report could not be written; the file is unchanged.
        """
        line = json.dumps(json_line(report), allow_nan=False).encode() + b"\n"
        written = os.write(self._file, line)
        if written < len(line):  # the disk is full: a part of a line would spoil the one after it
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, "no space left for a whole line", str(self.path))

    def notes(self) -> list[str]:
        """Return new lines for the user."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a file, without a torn last line (of a run that writes or was killed).

    Raises:
        DataError: The file is missing, or a line that is not the last is not an object.
    """
    values: list[dict[str, Any]] = []
    for block in read_blocks([str(path)]):
        for number, value, reason in records(block):
            if reason is not None and number == block.last_line and not block.data.endswith(b"\n"):
                break
            if reason is not None or not isinstance(value, dict):
                raise DataError(
                    f"{block.place(number)}: {reason or 'not an object'}. "
                    "Give the metrics.jsonl that a run wrote."
                )
            values.append(value)
    return values


def latest_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines that are still valid after resumes from earlier checkpoints, in order.

    Training that restarts at a step invalidates all reports from that step on, evaluations too. An
    evaluation repeated alone (``--skip-train``) replaces the earlier one of its set and step.
    """
    kept: list[dict[str, Any]] = []
    highest, evaluated = -1, set()
    for line in lines:
        step, key = line["step"], (line["step"], line.get("name"))
        if line["kind"] == "train":
            if step <= highest:
                kept = [other for other in kept if other["step"] < step]
                evaluated = {other for other in evaluated if other[0] < step}
            highest = step
        else:
            if key in evaluated:
                kept = [
                    other
                    for other in kept
                    if other["kind"] == "train" or (other["step"], other["name"]) != key
                ]
            evaluated.add(key)
            highest = max(highest, step)
        kept.append(line)
    return kept
