"""Parts of Markdown pages: tables, and when, where and with what the numbers were made."""

import datetime
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from megatron_sorted.command_line import ROOT

PACKAGES = ("torch", "megatron-core", "transformers")


def facts(setting: str = "1 thread, fp32", packages: Sequence[str] = PACKAGES) -> list[str]:
    """Return date, commit, machine and versions as lines of a list; ``setting`` says how the machine was used."""
    return [
        f"- date: {datetime.date.today().isoformat()}",
        f"- commit: {commit()}",
        f"- machine: {processor()}, {setting}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in packages)}",
    ]


def commit() -> str:
    """Return the commit, marked where files other than documents differ from it."""

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = ask("status", "--porcelain", "--", ".", ":!docs")
    return (ask("rev-parse", "--short", "HEAD") or "unknown (no git)") + (
        "-dirty" if changed else ""
    )


def processor() -> str:
    """Return processor and number of cores."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [
        platform.processor() or "unknown"
    ]
    return f"{names[0]}, {len(names)} cores"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table and an empty one; the first column is text, the others are numbers."""
    return [
        f"| {' | '.join(heads)} |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
