"""Reports as JSON lines: one object a report, appended, readable while the run goes on."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from megatron_sorted.monitoring.report import EvaluationReport, StepReport


def finite_or_none(value: Any) -> Any:
    """Returns plain data in which every number that JSON does not know (a loss that overflowed) is None."""
    if isinstance(value, dict):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines:
    """Appends reports to a file; lines of a run that is continued follow those of the run before."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, report: StepReport | EvaluationReport) -> None:
        """Appends one report."""
        kind = "train" if isinstance(report, StepReport) else "evaluation"
        line = json.dumps({"kind": kind, "time": time.time(), **finite_or_none(dataclasses.asdict(report))}, allow_nan=False)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
