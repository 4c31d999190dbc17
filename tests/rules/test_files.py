"""The repository holds sources and small pictures, and no generated files."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 500_000
GENERATED = {"build", "dist", "runs", "__pycache__", "node_modules", "site-packages"}


def test_no_generated_file_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone, so the tracked files are unknown")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert len(tracked) > 100
    assert [
        path for path in tracked if GENERATED & set(path.parts) or path.parts[0].startswith(".venv")
    ] == []
    assert [path for path in tracked if (ROOT / path).stat().st_size > MAX_BYTES] == []
