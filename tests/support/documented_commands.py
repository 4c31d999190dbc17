"""The commands that README and docs show, as argument lists."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.rules.sources import ROOT

START = re.compile(
    r"(?:\.venv/bin/)?(?:megatron-sorted|torchrun|srun|python3?|make|slurm/[\w.]+|pip)(?:\s|$)"
)
"""The start of a line of a code block that is a command to check."""
REMARK = re.compile(r"\s{2,}(?!-)\S.*$|\s+#\s.*$")
"""An explanation after a command on its line, separated by two spaces or a `#`."""


@dataclass(frozen=True)
class Documented:
    """A command as a page shows it.

    Attributes:
        page: The page, from the project's folder.
        line: The line number there.
        arguments: The command and its arguments, without remarks and ellipses.
    """

    page: str
    line: int
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Return the pages whose commands are checked: README, docs and the notes in example runs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(page: Path) -> Iterator[Documented]:
    """Yield the commands in the code blocks and in the code of tables of one page."""
    name, lines = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8").split("\n")
    fenced, number = None, 0
    while number < len(lines):
        line, first = lines[number], number + 1
        number += 1
        if line.startswith("```"):
            fenced = None if fenced is not None else line[3:].strip()
            continue
        if fenced is None and line.startswith("|"):
            for code in re.findall(r"`([^`]+)`", line):
                if START.match(code) and len(code.split()) > 2:
                    yield Documented(name, first, _arguments(code))
            continue
        if fenced is None and not line.startswith("    "):
            continue
        text = line.strip()
        if fenced not in (None, "bash") or not START.match(text):
            continue
        while text.endswith("\\") and number < len(lines):
            text = text[:-1].rstrip() + " " + lines[number].strip()
            number += 1
        yield Documented(name, first, _arguments(REMARK.sub("", text)))


def _arguments(text: str) -> tuple[str, ...]:
    text = re.split(r"\s(?:\|\|?|&&|;|>|<)\s", text)[0]  # the first command of the line
    return tuple(word for word in shlex.split(text) if word not in ("...", "(your", "flags)"))
