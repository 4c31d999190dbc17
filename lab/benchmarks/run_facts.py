"""What every page on whole runs says: when, where and under which load it was measured."""

from pathlib import Path
from typing import Any

from lab.benchmarks.pages import write_page
from lab.benchmarks.report import origin
from lab.benchmarks.run_jobs import CaseResult


def file_system_of(path: Path) -> str:
    """Return kind and device of the file system that holds ``path``; "unknown" where the system does not tell."""
    mounts = Path("/proc/mounts")
    lines = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    there = [
        (len(where), f"{kind} on {device}")
        for device, where, kind, *_ in lines
        if path.resolve().is_relative_to(where)
    ]
    return max(there, default=(0, "unknown"))[1]


def facts_of(results: list[CaseResult]) -> dict[str, str]:
    """Return when, where and how these runs were measured."""
    before, after = (
        [result.load_before for result in results],
        [result.load_after for result in results],
    )
    return {
        **origin("cpu", 1, bf16=False),
        "load of the machine": f"{before[0]:.1f} before the first run, {min(after):.1f} to {max(after):.1f} after each (1-minute mean; the "
        "run's own processes are in it)",
    }


def write_run_page(
    folder: Path, name: str, lines: list[str], numbers: dict[str, Any], results: list[CaseResult]
) -> str:
    """Return the page, after writing it and its numbers: those of the tables and those of every step, save and load."""
    raw = [
        {
            "case": result.case.as_dict(),
            "load": [result.load_before, result.load_after],
            "seconds": round(result.seconds, 1),
            "ranks": result.ranks,
        }
        for result in results
    ]
    return write_page(folder, name, "\n".join(lines), {**numbers, "runs": raw})
