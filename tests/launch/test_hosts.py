"""The launcher over ssh, on three addresses of this machine: a run, failures, Ctrl-C, bad hosts."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.conftest import (
    ROOT,
    RUN,
    last_step,
    processes_in,
    running,
    wait_for,
    workers,
    write_site,
)
from tests.support.clean_environment import clean_environment
from tests.support.ports import free_port
from tests.support.ssh_hosts import ADDRESSES, SshHosts, missing_programs

PDSH = pytest.mark.skipif(not shutil.which("pdsh"), reason="pdsh missing: apt-get install pdsh")


@pytest.fixture(scope="session")
def hosts() -> Iterator[SshHosts]:
    """Return running hosts."""
    reason = missing_programs()
    with running(SshHosts, reason and f"ssh: {reason}", "sshd_") as started:
        yield started


@pytest.fixture
def three(folder, hosts) -> Path:
    """Return a folder with a run of three processes."""
    (folder / "run.yaml").write_text(
        RUN.replace("world-size: 2", "world-size: 3").replace(
            "global-batch-size: 4", "global-batch-size: 6"
        )
    )
    write_site(folder, SSH_OPTIONS=hosts.options, REMOTE_SHELL="ssh", MASTER_PORT=free_port())
    (folder / "hosts").write_text("# first node first\n" + "\n".join(ADDRESSES) + "\n")
    return folder


def launch(
    folder: Path, *arguments: object, project: Path = ROOT, hosts: str = "hosts"
) -> subprocess.Popen:
    """Start the run in ``folder`` on its hosts with scripts of ``project``, in a new session."""
    with open(folder / "console.out", "w") as console:
        command = [
            project / "slurm" / "launch_hosts.sh",
            "gpu",
            "--hosts",
            hosts,
            "--site",
            "site",
            "--logs",
            "logs",
            "run.yaml",
        ]
        return subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=folder,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=clean_environment(),
        )


def console(folder: Path) -> str:
    return (folder / "console.out").read_text()


def check_refused(folder: Path, launcher: subprocess.Popen, *texts: str) -> None:
    """Check that the launch was refused before training, with these messages."""
    assert launcher.wait(timeout=240) != 0, console(folder)
    for text in texts:
        assert text in console(folder), console(folder)
    assert not (folder / "save" / "metrics.jsonl").exists() and not processes_in(folder)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ssh", pytest.param("pdsh", marks=PDSH)])
def test_a_run_on_three_hosts(three, hosts, strategy):
    write_site(three, SSH_OPTIONS=hosts.options, REMOTE_SHELL=strategy, MASTER_PORT=free_port())
    assert launch(three, "--train-iters", 3).wait(timeout=300) == 0, console(three)
    assert "3 nodes agree: device cpu, " in console(
        three
    ) and "3 processes on cpu: tp 1 x pp 1 x dp 3" in console(three)
    assert last_step(three) == 3 and not processes_in(three)
    assert {path.name for path in (three / "logs").glob("*.log")} == {
        f"{address}.log" for address in ADDRESSES
    }


def test_a_failure_on_one_host_ends_all(three, tiny):
    launcher = launch(three, "--train-iters", 100000, project=tiny)
    wait_for("three steps", lambda: last_step(three) >= 3, 240, three)
    workers(three)[1].kill()
    assert launcher.wait(timeout=60) == 1
    assert f"error: {ADDRESSES[1]} ended first, with status 1; all others were ended." in console(
        three
    ), console(three)
    assert not processes_in(three)


@pytest.mark.parametrize(
    "strategy", [pytest.param("ssh", marks=pytest.mark.long), pytest.param("pdsh", marks=PDSH)]
)
def test_ctrl_c_saves_and_ends_all(three, hosts, strategy):
    write_site(three, SSH_OPTIONS=hosts.options, REMOTE_SHELL=strategy, MASTER_PORT=free_port())
    launcher = launch(three, "--train-iters", 100000)
    wait_for("three steps", lambda: last_step(three) >= 3, 240, three)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(timeout=90) == 130, console(three)
    assert "stopped by SIGINT; nothing is left running" in console(three)
    assert not processes_in(three) and (three / "save" / "stopped.json").exists()


@pytest.mark.long
def test_nothing_outlives_a_launcher_that_is_killed(three, tiny):
    launcher = launch(three, "--train-iters", 100000, project=tiny)
    wait_for("three steps", lambda: last_step(three) >= 3, 240, three)
    launcher.kill()
    launcher.wait()
    wait_for("the end of all", lambda: not processes_in(three), 60, three)


def test_a_host_that_cannot_be_reached_is_named(three):
    launcher = launch(three, hosts=f"{ADDRESSES[0]},{ADDRESSES[1]},127.0.0.9")
    check_refused(
        three,
        launcher,
        "error: 127.0.0.9: cannot be reached: ",
        "Connection refused",
        ' 127.0.0.9 true" work, or ',
    )
