"""When, where and with what the numbers were made."""

import datetime
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from .recipe import Recipe
from .steps import PYTHON, ROOT, Step

PACKAGES = ("torch", "megatron-core", "transformers")


def facts(setting: str = "1 thread, fp32", packages: Sequence[str] = PACKAGES) -> list[str]:
    """Returns date, commit, machine and versions as lines of a list; ``setting`` says how the machine was used."""
    return [f"- date: {datetime.date.today().isoformat()}", f"- commit: {commit()}", f"- machine: {machine()}, {setting}",
            f"- versions: {', '.join(f'{name} {version(name)}' for name in packages)}"]


def commit() -> str:
    """Returns the commit, marked where files other than documents differ from it."""
    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = ask("status", "--porcelain", "--", ".", ":!docs")
    return (ask("rev-parse", "--short", "HEAD") or "unknown (no git)") + ("-dirty" if changed else "")


def machine() -> str:
    """Returns processor and number of cores."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor() or "unknown"]
    return f"{names[0]}, {len(names)} cores"


def shown(step: Step, recipe: Recipe) -> str:
    """Returns the step's command as a page shows it: files from outside by name alone, on lines of readable length."""
    names = {str(recipe.model): recipe.model.name} if recipe.model.is_absolute() else {}
    names |= {str(path): path.name for path in step.reads if path.is_absolute() and not path.is_relative_to(ROOT)}
    words = []
    for word in step.command:
        for path, name in names.items():
            word = word.replace(path, name)
        words.append(shlex.quote(word) if word != PYTHON else word)
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > 126:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f"{' ' if lines[-1].strip() else ''}{word}"
    return "\n".join(f"    {line}" for line in lines)
