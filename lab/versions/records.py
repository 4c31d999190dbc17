"""What was found out, kept by the state of the sources, so that a stopped program continues."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from megatron_sorted.files import write_text_atomically
from megatron_sorted.installation import ROOT
from megatron_sorted.reading.json_text import read_json_object


def _git(*arguments: str) -> bytes:
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).stdout


def sources_key() -> str:
    """Return a hash of all sources as they are now, committed or not; docs/ is left out.

    A commit that only changes pages, such as one with the results, repeats nothing.
    """
    names = _git(
        "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".", ":!docs"
    )
    digest = hashlib.sha256()
    for name in sorted(set(names.decode().split("\0")) - {""}):
        path = ROOT / name
        if path.is_file():
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


class Records:
    """Results by name, a JSON file each, in a folder for this state of the sources."""

    def __init__(self, folder: Path):
        self.folder = folder / "results" / sources_key()

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a result, or None."""
        path = self.folder / f"{name}.json"
        return read_json_object(path) if path.is_file() else None

    def put(self, name: str, result: dict[str, Any]) -> None:
        """Keep a result; an earlier one of that name is replaced."""
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(result))

    def forget(self, name: str) -> None:
        """Remove a result, if there is one."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)
