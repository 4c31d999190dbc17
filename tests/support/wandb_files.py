"""The directories of wandb's offline runs, read with its own messages."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK_BYTES = 32768
HEADER_BYTES = 7  # of the file, and of every piece of a record


@dataclass(frozen=True)
class WandbRun:
    """One directory, which one process of a run wrote.

    Attributes:
        rows: The history, keys as logged (``_step``, ``_timestamp`` and ``_runtime`` are wandb's).
        config: The run's config.
        step_metrics: {name or glob: x axis}.
        exit_code: None if the run was not finished.
    """

    directory: Path
    run_id: str
    project: str
    entity: str
    group: str
    name: str
    resume: bool
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    step_metrics: dict[str, str]
    exit_code: int | None

    def values(self) -> list[dict[str, Any]]:
        """Return the rows without wandb's own keys."""
        return [
            {key: value for key, value in row.items() if not key.startswith("_")}
            for row in self.rows
        ]


def _records(path: Path) -> list[bytes]:
    """Return the records of a .wandb file: LevelDB's log format after a header of wandb's."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", path
    records, whole, position = [], b"", HEADER_BYTES
    while position + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < HEADER_BYTES:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        position += HEADER_BYTES
        if kind == 0 or position + size > len(data):
            break  # the process ended in the middle
        whole = (b"" if kind in (1, 2) else whole) + data[position : position + size]
        position += size
        if kind in (1, 4):  # a whole record, or its last piece
            records.append(whole)
    return records


def _plain(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_wandb_run(directory: Path) -> WandbRun:
    """Read one directory ``offline-run-...`` (or ``run-...``)."""
    from wandb.proto import wandb_internal_pb2

    (path,) = directory.glob("*.wandb")
    run, config, rows, metrics, exit_code = None, {}, [], {}, None
    for data in _records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = run or record.run
            config |= _plain(record.run.config.update)
        elif kind == "config":
            config |= _plain(record.config.update)
        elif kind == "history":
            rows.append(_plain(record.history.item))
        elif kind == "metric" and record.metric.step_metric:
            metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            exit_code = record.exit.exit_code
    assert run is not None, f"{path} holds no run"
    config.pop("_wandb", None)
    return WandbRun(
        directory,
        run.run_id,
        run.project,
        run.entity,
        run.run_group,
        run.display_name,
        run.resume,
        config,
        rows,
        metrics,
        exit_code,
    )


def read_wandb_runs(root: Path) -> list[WandbRun]:
    """Return all runs under a directory (``--wandb-save-dir``, or ``--save``), oldest first."""
    directories = [
        path
        for path in (root / "wandb").glob("*run-*-*")
        if path.is_dir() and not path.is_symlink()
    ]
    return [
        read_wandb_run(path)
        for path in sorted(directories, key=lambda path: path.name.removeprefix("offline-"))
    ]
