"""A tiny run, a site file for this machine, and what the tests do to jobs."""

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from tests.support.slurm_cluster import SlurmCluster, missing_programs

Server = TypeVar("Server")
ROOT = Path(__file__).resolve().parents[2]
STEPS = 150
RUN = f"""\
# A tiny run.
# world-size: 2

num-layers: 2
hidden-size: 32
num-attention-heads: 2
seq-length: 64
hidden-dropout: 0.1
exit-layer-nums: [1]
device: cpu
mock-data: true
tokenizer-type: NullTokenizer
vocab-size: 128
micro-batch-size: 2
global-batch-size: 4
lr: 1.0e-2
train-iters: {STEPS}
log-interval: 1
save: save
load: save
"""


def write_site(folder: Path, **more: object) -> Path:
    """Writes the site file of two nodes on this machine, with one process each, and returns its path."""
    values = {"DEVICES_PER_NODE": 1, "PYTHON": sys.executable, "ONE_MACHINE": "yes", "DEVICE_REQUEST": "--gres=gpu:1",
              "SBATCH_OPTIONS": "--mem=100", **more}
    path = folder / "site"
    path.write_text("".join(f'{name}="{value}"\n' for name, value in values.items()))
    return path


def wait_for(what: str, true: Callable[[], object], seconds: float, folder: Path) -> None:
    """Waits until something is true; what the run printed tells why it did not become so."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"{what}: not within {seconds} s\n" + "\n".join(path.read_text() for path in folder.glob("*.out"))
        time.sleep(0.3)


def last_step(folder: Path) -> int:
    """Returns the last step that the run in ``folder`` has reported."""
    path = folder / "save" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def workers(folder: Path) -> dict[int, psutil.Process]:
    """Returns the processes that train the run in ``folder``, by rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and "pretrain_sorted.py" in " ".join(process.cmdline()) and "RANK" in process.environ():
                found[int(process.environ()["RANK"])] = process
        except psutil.Error:
            continue
    return found


def processes_in(folder: Path) -> dict[str, psutil.Process]:
    """Returns every process that works in ``folder``, by number and command line."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found[f"{process.pid}: {' '.join(process.cmdline())}"] = process
        except psutil.Error:
            continue
    return found


def is_warned(process: psutil.Process) -> bool:
    """Returns whether SIGUSR1 waits for a process that is stopped, or came before and is ignored now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("ShdPnd", "SigIgn"))]
    return any(mask >> (signal.SIGUSR1 - 1) & 1 for mask in masks)


def hold_until_warned(folder: Path, seconds: float, cause: Callable[[], None] = lambda: None) -> None:
    """Stops a rank from the first step until a warning has come, so that the run cannot end before; then lets it go on."""
    wait_for("a step", lambda: last_step(folder) >= 1, 240, folder)
    worker = workers(folder)[1]
    worker.suspend()
    try:
        cause()
        wait_for("a warning", lambda: is_warned(worker), seconds, folder)
    finally:
        worker.resume()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Returns a new folder with ``run.yaml`` and ``site``, in which jobs leave what they print."""
    path = Path(tempfile.mkdtemp(prefix="launch_")).resolve()
    (path / "run.yaml").write_text(RUN)
    write_site(path)
    yield path
    for process in processes_in(path).values():  # of a test that failed
        with suppress(psutil.Error):
            process.kill()
    shutil.rmtree(path)


@contextmanager
def running(server: type[Server], missing: str | None, prefix: str) -> Iterator[Server]:
    """Yields a server that has started in a folder of its own, and stops it; where programs are missing, reports the test as not run."""
    if missing:
        pytest.skip(missing)
    path = Path(tempfile.mkdtemp(prefix=prefix))
    started = server(path)
    try:
        started.start()
        yield started
    finally:
        started.stop()
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Returns a running SLURM of two nodes."""
    reason = missing_programs()
    with running(SlurmCluster, reason and f"SLURM: {reason}", "slurm_") as started:
        yield started
