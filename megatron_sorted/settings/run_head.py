"""What the comment at the head of a run file says of the run: for how many processes, and for which device, it was made."""

import re
from pathlib import Path

from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.text_file import read_text


def said_in_head(path: str | Path, name: str) -> str | None:
    """Return what a line ``# name: value`` says in the comment at a file's head; None where there is none.

    The launchers in slurm/ read ``world-size`` likewise.

    Raises:
        SettingsError: The file cannot be read, or is no text.
    """
    head = re.split(r"^\s*$", read_text(path, error=SettingsError), maxsplit=1, flags=re.MULTILINE)[0]
    found = re.search(rf"^# {re.escape(name)}: (\S+)[ \t\r]*$", head, re.MULTILINE)
    return found.group(1) if found else None
