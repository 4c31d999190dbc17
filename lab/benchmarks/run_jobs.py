"""Starts the runs that are measured, in processes of their own, and gathers what their ranks wrote."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.benchmarks.run_cases import LOG_INTERVALS, RunCase
from lab.reliability.task import environment

LIMIT_SECONDS = 900
"""No case takes so long on any machine that a measurement is wanted of."""


@dataclass(frozen=True)
class CaseResult:
    """What was measured of a case: one entry a rank, and the load of the machine when it began and when it ended (1-minute mean)."""

    case: RunCase
    ranks: list[Any]
    load_before: float
    load_after: float
    seconds: float


def command_words(case: RunCase, data: Path) -> list[str]:
    """Return the run's command line; ``data`` is the folder of the task, what the run writes goes where it is started."""
    words = [
        "--data-path",
        str(data / "data" / "task_text_document"),
        "--tokenizer-model",
        str(data / "data" / "task_tokenizer.model"),
        "--split",
        "100,0",
    ]
    if case.kind == "loop":
        words += ["--metrics-file", "metrics.jsonl", "--tensorboard-dir", "tensorboard"]
    else:
        words += ["--save", "save", "--save-retain", "2", "--metrics-file", "metrics.jsonl"]
    for name, value in case.settings.items():
        flag = f"--{name.replace('_', '-')}"
        words += (
            [flag]
            if value is True
            else [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]
        )
    return words


def run_case(case: RunCase, folder: Path, data: Path) -> CaseResult:
    """Return what the ranks of a case measured.

    Args:
        case: What to run.
        folder: Empty; what the run writes goes there.
        data: Where ``reliability.task.write_task`` has written.

    Raises:
        RuntimeError: A rank failed; the message holds the end of its output.
    """
    began, load_before = time.monotonic(), os.getloadavg()[0]
    job = {
        "kind": case.kind,
        "words": command_words(case, data),
        "folder": str(folder),
        "rounds": case.rounds,
        "leg_steps": case.leg_steps,
        "intervals": LOG_INTERVALS,
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    launch = [sys.executable]
    if case.num_processes > 1:
        launch += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(case.num_processes),
        ]
    log = folder / "log"
    with open(log, "w", encoding="utf-8") as output:
        done = subprocess.run(
            [*launch, "-m", "lab.benchmarks.run_worker", "job.json"],
            cwd=folder,
            env=environment(),
            stdout=output,
            stderr=output,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(
            f"{case.name}: ended with status {done.returncode}; the end of its output:\n{log.read_text()[-3000:]}"
        )
    ranks = [
        json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
        for rank in range(case.num_processes)
    ]
    return CaseResult(case, ranks, load_before, os.getloadavg()[0], time.monotonic() - began)
