"""What is in the repository: sources and small pictures, nothing that is made."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 500_000
MADE = {"build", "dist", "runs", "__pycache__", "node_modules", "site-packages"}


def test_nothing_that_is_made_is_kept():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone, so nobody knows what is kept")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert len(tracked) > 100
    assert [
        path for path in tracked if MADE & set(path.parts) or path.parts[0].startswith(".venv")
    ] == []
    assert [path for path in tracked if (ROOT / path).stat().st_size > MOST_BYTES] == []
