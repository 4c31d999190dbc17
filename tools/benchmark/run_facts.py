"""What every page on whole runs says: when, where and under which load it was measured; and the writing of pages."""

import datetime
import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmark.report import PACKAGES, commit, machine
from benchmark.run_jobs import CaseResult
from megatron_sorted.files import write_text_atomically


def file_system_of(path: Path) -> str:
    """Returns kind and device of the file system that holds ``path``; "unknown" where the system does not tell."""
    mounts = Path("/proc/mounts")
    lines = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    there = [(len(where), f"{kind} on {device}") for device, where, kind, *_ in lines if path.resolve().is_relative_to(where)]
    return max(there, default=(0, "unknown"))[1]


def facts_of(results: list[CaseResult]) -> dict[str, str]:
    """Returns when, where and how these runs were measured."""
    before, after = [result.load_before for result in results], [result.load_after for result in results]
    return {
        "date": datetime.date.today().isoformat(), "commit": commit(), "command": shlex.join(["python", *sys.argv]),
        "machine": machine("cpu", 1), "precision": "fp32", "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "load of the machine": f"{before[0]:.1f} before the first run, {min(after):.1f} to {max(after):.1f} after each (1-minute mean; the "
                               "run's own processes are in it)",
    }


def bullets(facts: dict[str, str]) -> list[str]:
    """Returns facts as lines of a list."""
    return [f"- {name}: {value}" for name, value in facts.items()]


def write_page(folder: Path, name: str, lines: list[str], numbers: dict[str, Any], results: list[CaseResult]) -> str:
    """Returns the page, after writing it and its numbers: those of the tables and those of every step, save and load."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    raw = [{"case": result.case.as_dict(), "load": [result.load_before, result.load_after], "seconds": round(result.seconds, 1),
            "ranks": rounded(result.ranks)} for result in results]
    write_text_atomically(folder / f"{name}.md", text)
    write_numbers(folder / f"{name}.json", {**rounded(numbers), "runs": raw})
    return text


def write_numbers(path: Path, numbers: dict[str, Any]) -> None:
    """Writes plain data as JSON, one line for each key."""
    body = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in numbers.items())
    write_text_atomically(path, f"{{\n{body}\n}}\n")


def rounded(value: Any) -> Any:
    """Returns plain data with every float to the microsecond: more is noise, and would be most of the file."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value
