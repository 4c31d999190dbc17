"""Jobs: measurements in processes of their own, given and answered as JSON files.

Nothing heavy is imported here, because some jobs measure the memory of their process.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.benchmarks.run_cases import LOG_INTERVALS, RunCase
from lab.reliability.processes import environment, torchrun

LIMIT_SECONDS = 1800
"""No measurement takes this long on a machine whose numbers are of interest."""


def run_job(module: str, job: dict[str, Any], folder: Path, num_processes: int = 1) -> list[Any]:
    """Return what each process of ``python -m MODULE job.json`` measured, started in ``folder``.

    Raises:
        RuntimeError: A process failed; the message holds the end of its output.
    """
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    log = folder / "log"
    launcher = torchrun(num_processes) if num_processes > 1 else [sys.executable]
    with open(log, "w", encoding="utf-8") as output:
        ended = subprocess.run(
            [*launcher, "-m", module, "job.json"],
            cwd=folder,
            env=environment(),
            stdout=output,
            stderr=output,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    if ended.returncode:
        raise RuntimeError(
            f"{job['name']}: ended with status {ended.returncode}; the end of its output:\n"
            f"{log.read_text()[-3000:]}"
        )
    return [
        json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
        for rank in range(num_processes)
    ]


def do_job(measure: Callable[[dict[str, Any]], Any]) -> None:
    """Measure the job whose file the command line names, and write what this rank found."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    path = Path(f"rank_{os.environ.get('RANK', 0)}.json").resolve()
    path.write_text(json.dumps(measure(job)), encoding="utf-8")


@dataclass(frozen=True)
class CaseResult:
    """What was measured of a case of whole runs.

    Attributes:
        ranks: One entry for each rank.
        load_before, load_after: Load of the machine at start and end (1-minute mean).
    """

    case: RunCase
    ranks: list[Any]
    load_before: float
    load_after: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain data for a page's JSON file."""
        return {
            "case": asdict(self.case),
            "load": [self.load_before, self.load_after],
            "seconds": round(self.seconds, 1),
            "ranks": self.ranks,
        }


def load_of(results: list[CaseResult]) -> dict[str, str]:
    """Return the fact that states under which load these runs were measured."""
    after = [result.load_after for result in results]
    return {
        "load of the machine": f"{results[0].load_before:.1f} before the first run, "
        f"{min(after):.1f} to {max(after):.1f} after each (1-minute mean; the run's own processes "
        "are in it)"
    }


def run_arguments(case: RunCase, data: Path) -> list[str]:
    """Return the command line of a run.

    ``data`` is the folder of the task; the run writes into the folder that it is started in.
    """
    outputs = {
        "loop": ("--tensorboard-dir", "tensorboard"),
        "checkpoint": ("--save", "save", "--save-retain", "2"),
    }
    arguments = [
        *("--data-path", str(data / "data" / "task_text_document"), "--split", "100,0"),
        *("--tokenizer-model", str(data / "data" / "task_tokenizer.model")),
        *("--metrics-file", "metrics.jsonl", *outputs[case.kind]),
    ]
    for name, value in case.settings.items():
        arguments.append(f"--{name.replace('_', '-')}")
        if value is not True:
            arguments += map(str, value if isinstance(value, list) else [value])
    return arguments


def run_case(case: RunCase, folder: Path, data: Path) -> CaseResult:
    """Return what the ranks of a case measured.

    Args:
        case: The case to run.
        folder: An empty folder, which the run writes into.
        data: The folder that ``reliability.task.write_task`` has written.

    Raises:
        RuntimeError: A rank failed; the message holds the end of its output.
    """
    began, load_before = time.monotonic(), os.getloadavg()[0]
    job = {
        "name": case.name,
        "kind": case.kind,
        "arguments": run_arguments(case, data),
        "rounds": case.rounds,
        "leg_steps": case.leg_steps,
        "intervals": LOG_INTERVALS,
    }
    ranks = run_job("lab.benchmarks.run_worker", job, folder, case.num_processes)
    return CaseResult(case, ranks, load_before, os.getloadavg()[0], time.monotonic() - began)
