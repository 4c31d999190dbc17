"""Parts of Markdown pages: tables, and the date, commit, machine and versions of the numbers."""

import datetime
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from megatron_sorted.installation import ROOT

PACKAGES = ("torch", "megatron-core", "transformers")


def facts(setting: str = "1 thread, fp32", packages: Sequence[str] = PACKAGES) -> list[str]:
    """Return date, commit, machine and versions as lines of a list.

    Args:
        setting: How the machine was used.
        packages: The packages whose versions are listed.
    """
    return [
        f"- date: {datetime.date.today().isoformat()}",
        f"- commit: {commit()}",
        f"- machine: {processor()}, {setting}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in packages)}",
    ]


def commit() -> str:
    """Return the commit, with "-dirty" if files outside docs/ differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!docs")
    return (git("rev-parse", "--short", "HEAD") or "unknown (no git)") + "-dirty" * bool(changed)


def processor() -> str:
    """Return the processor's name and number of cores."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [
        platform.processor() or "unknown"
    ]
    return f"{names[0]}, {len(names)} cores"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, whose columns after the first are numbers, and a blank.

    >>> table(["exit", "loss"], [["4", "2.31"]])
    ['| exit | loss |', '|---|---:|', '| 4 | 2.31 |', '']
    """
    return [
        f"| {' | '.join(heads)} |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
