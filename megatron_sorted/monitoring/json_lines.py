"""Reports as JSON lines: one object a report, appended, readable while the run goes on."""

import dataclasses
import json
import time
from pathlib import Path

from megatron_sorted.monitoring.report import EvaluationReport, StepReport


class JsonLines:
    """Appends reports to a file; lines of a run that is continued follow those of the run before."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, report: StepReport | EvaluationReport) -> None:
        """Appends one report."""
        kind = "train" if isinstance(report, StepReport) else "evaluation"
        line = json.dumps({"kind": kind, "time": time.time(), **dataclasses.asdict(report)})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
