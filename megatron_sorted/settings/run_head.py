"""What the comment at the head of a run file says of the run: for how many processes, and for which device, it was made."""

import re
from pathlib import Path


def said_in_head(path: str | Path, name: str) -> str | None:
    """Return what a line ``# name: value`` says in the comment at a file's head; None where there is none.

    The launchers in slurm/ read ``world-size`` likewise.
    """
    head = re.split(r"^\s*$", Path(path).read_text(encoding="utf-8"), maxsplit=1, flags=re.MULTILINE)[0]
    found = re.search(rf"^# {re.escape(name)}: (\S+)[ \t\r]*$", head, re.MULTILINE)
    return found.group(1) if found else None
