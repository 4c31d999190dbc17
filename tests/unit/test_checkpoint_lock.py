"""Two runs never save into one directory, whatever becomes of the first."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sorted.checkpoint.lock import DirectoryLock
from megatron_sorted.errors import CheckpointError

HOLD = """
import sys, time
from megatron_sorted.checkpoint.lock import DirectoryLock
lock = DirectoryLock(sys.argv[1])
assert lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Return a process that holds the directory."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "SLURM_JOB_ID": "4711",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_with_the_name_of_the_holder(tmp_path, holder):
    with pytest.raises(CheckpointError) as error:
        DirectoryLock(tmp_path).acquire(patience_seconds=0.3)
    assert str(error.value).startswith(f"--save: another run is saving into {tmp_path} (")
    holder_record = json.loads(re.search(r"\((\{.*\})\)", str(error.value))[1])
    assert holder_record["process"] == holder.pid and holder_record["job"] == "4711"


def test_a_killed_holder_holds_no_longer(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    lock = DirectoryLock(tmp_path)
    assert lock.acquire(patience_seconds=5)
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    lock.release()


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(OSError):
        DirectoryLock(tmp_path / "missing").acquire()
