"""A tiny run, a site file for this machine, helpers for jobs, and a check that nothing is left."""

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

from tests.support.launch_project import SHORTER_WAITS, TINY_TRAINER, copy_project
from tests.support.slurm_cluster import SlurmCluster, missing_programs

Server = TypeVar("Server")
PASSED = pytest.StashKey[bool]()
ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable  # with which nodes train
STEPS = 150
RUN = f"""\
# A tiny run.
world-size: 2

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
    """Write the site file of two nodes on this machine, with a process each; return its path."""
    values = {
        "DEVICES_PER_NODE": 1,
        "PYTHON": PYTHON,
        "ONE_MACHINE": "yes",
        "DEVICE_REQUEST": "--gres=gpu:1",
        "SBATCH_OPTIONS": "--mem=100",
        **more,
    }
    path = folder / "site"
    path.write_text("".join(f'{name}="{value}"\n' for name, value in values.items()))
    return path


def wait_for(what: str, true: Callable[[], object], seconds: float, folder: Path) -> None:
    """Wait until something is true; if it never is, the error holds what the run printed."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"{what}: not within {seconds} s\n" + "\n".join(
            path.read_text() for path in folder.glob("*.out")
        )
        time.sleep(0.1)


def last_step(folder: Path) -> int:
    """Return the last step that the run in ``folder`` has reported."""
    path = folder / "save" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def workers(folder: Path) -> dict[int, psutil.Process]:
    """Return the processes that train the run in ``folder``, by rank."""
    matches = {}
    for process in psutil.process_iter():
        try:
            if (
                process.cwd() == str(folder)
                and "pretrain_sorted.py" in " ".join(process.cmdline())
                and "RANK" in process.environ()
            ):
                matches[int(process.environ()["RANK"])] = process
        except psutil.Error:
            continue
    return matches


def processes_in(folder: Path) -> dict[str, psutil.Process]:
    """Return every process that works in ``folder`` or below, by number and command line."""
    matches = {}
    for process in psutil.process_iter():
        try:
            if (
                Path(process.cwd()).is_relative_to(folder)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                matches[f"{process.pid}: {' '.join(process.cmdline())}"] = process
        except psutil.Error:
            continue
    return matches


def is_warned(process: psutil.Process) -> bool:
    """Return whether SIGUSR1 is pending for a stopped process, or came before and is ignored."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    masks = [
        int(line.split()[1], 16)
        for line in status.splitlines()
        if line.startswith(("ShdPnd", "SigIgn"))
    ]
    return any(mask >> (signal.SIGUSR1 - 1) & 1 for mask in masks)


def hold_until_warned(
    folder: Path, seconds: float, cause: Callable[[], None] = lambda: None
) -> None:
    """Suspend a rank from the first step until a warning comes, so that the run does not end."""
    wait_for("a step", lambda: last_step(folder) >= 1, 240, folder)
    worker = workers(folder)[1]
    worker.suspend()
    try:
        cause()
        wait_for("a warning", lambda: is_warned(worker), seconds, folder)
    finally:
        worker.resume()


def end_processes_in(folder: Path, seconds: float) -> dict[str, psutil.Process]:
    """Give the processes in ``folder`` time to end, kill the rest, and return them."""
    until = time.monotonic() + seconds
    while (left := processes_in(folder)) and time.monotonic() < until:
        time.sleep(0.1)
    for process in left.values():
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left.values(), timeout=10)
    return left


@pytest.fixture(scope="session", autouse=True)
def ends_in_good_order() -> Iterator[None]:
    """Let fixtures end their processes also when a time limit ends the session."""
    before = signal.signal(
        signal.SIGTERM, lambda number, frame: pytest.exit("ended by SIGTERM", 143)
    )
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Record for fixtures whether the test has passed."""
    report = yield
    item.stash[PASSED] = report.when == "call" and report.passed
    return report


@pytest.fixture
def folder(request, monkeypatch) -> Iterator[Path]:
    """Return a new folder with ``run.yaml`` and ``site``, for jobs and their output.

    It also holds temporary files. All programs that a test leaves in it are ended; after a passing
    test they are an error.
    """
    path = Path(tempfile.mkdtemp(prefix="launch_")).resolve()
    (path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(path / "tmp"))  # which clean_environment hands on
    (path / "run.yaml").write_text(RUN)
    write_site(path)
    yield path
    left = end_processes_in(path, 5)
    shutil.rmtree(path)
    assert not (left and request.node.stash[PASSED]), f"left running: {', '.join(left)}"


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> Path:
    """Return a copy of the project that waits less."""
    return copy_project(tmp_path_factory.mktemp("quick") / "project", lines=SHORTER_WAITS)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Return a copy of the project with a trainer without torch, for tests of launchers alone."""
    return copy_project(tmp_path_factory.mktemp("tiny") / "project", TINY_TRAINER)


@contextmanager
def running(server: type[Server], missing: str | None, prefix: str) -> Iterator[Server]:
    """Yield a started server with its own folder, then stop it; skip if programs are missing."""
    if missing:
        pytest.skip(missing)
    path = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        started = server(path)
        try:
            started.start()
            yield started
        finally:
            started.stop()
    finally:
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Return a running SLURM of two nodes."""
    reason = missing_programs()
    with running(SlurmCluster, reason and f"SLURM: {reason}", "slurm_") as started:
        yield started


@pytest.fixture
def cluster(slurm) -> Iterator[SlurmCluster]:
    """Return that SLURM with free nodes; jobs that a failed test has left are ended."""
    yield slurm
    slurm.cancel_all()
