"""Weights & Biases with its real package: runs written offline and read back, and all failures."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sorted.monitoring import wandb_writer
from megatron_sorted.monitoring.json_lines import read_json_lines
from megatron_sorted.monitoring.report import EvaluationReport, ExitNumbers, StepReport
from megatron_sorted.monitoring.values import metric_values
from megatron_sorted.monitoring.writers import Writers, open_writers
from megatron_sorted.settings.run import Settings
from tests.support.wandb_files import read_wandb_run, read_wandb_runs
from tests.support.wandb_server import wandb_server

SETTINGS = dataclasses.replace(
    Settings(), num_layers=4, wandb_project="nested", wandb_mode="offline"
)
KEY = "k" * 40
DESCRIPTION = {"settings": {"lr": 0.1, "exit_layer_nums": [2, 4]}, "torch": "2.13"}


def step(number: int, mark: float = 0.0) -> StepReport:
    return StepReport(
        step=number,
        total_steps=100,
        samples=4 * number,
        learning_rate=1e-3 / number,
        grad_norm=0.5 + mark,
        loss_scale=1.0,
        skipped=0,
        step_seconds=0.25,
        tokens_per_second=4096.0,
        seconds_left=100.0 - number,
        tflops_per_device=1.5,
        mfu=0.25,
        memory_bytes=10**9,
        exits={
            2: ExitNumbers(
                3.0 / number + mark, 0.5, 0.3, grad_norm=0.1, agreement=0.75, accept_length=1.5
            ),
            4: ExitNumbers(2.0 / number + mark, 0.6, 1.0, agreement=1.0, accept_length=1.0),
        },
    )


def evaluation(number: int, name: str) -> EvaluationReport:
    return EvaluationReport(
        number,
        name,
        1.0,
        99,
        {2: ExitNumbers(2.5, 0.5, exact_match=0.25), 4: ExitNumbers(1.5, 0.5)},
    )


@pytest.fixture(autouse=True)
def _no_account(tmp_path, monkeypatch):
    """Neither an account nor settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def opened(folder: Path, resumed: int = 0, **settings) -> tuple[Writers, list[str]]:
    logged = []
    values = dataclasses.replace(SETTINGS, save=str(folder), **settings)
    return open_writers(values, "run7", resumed, DESCRIPTION, logged.append), logged


def process_of(writers: Writers) -> subprocess.Popen:
    """Return wandb's process, once the run is open."""
    writer = writers._writers[-1]
    deadline = time.monotonic() + 30
    while writer._process.started is None and time.monotonic() < deadline:
        writer._advance()
        time.sleep(0.05)
    return writer._process._process


def wandb_processes() -> list[str]:
    """Return the command lines of the processes of wandb that this test started."""
    command_lines = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            ours = f"HOME={os.environ['HOME']}".encode() in (path / "environ").read_bytes().split(
                b"\0"
            )
        except OSError:
            continue
        if ours and any(one.endswith(("wandb-core", "wandb_process")) for one in arguments):
            command_lines.append(" ".join(arguments))
    return command_lines


def test_an_offline_run_holds_every_report(tmp_path):
    writers, logged = opened(
        tmp_path / "save",
        wandb_entity="team",
        wandb_group="g",
        tensorboard_dir=str(tmp_path / "tb"),
    )
    for number in (1, 2, 3):
        writers.write(step(number))
    writers.write(evaluation(3, "first"))
    writers.write(evaluation(3, "second"))
    writers.close()
    (run,) = read_wandb_runs(tmp_path / "save")
    assert logged == [f"wandb: offline. Send the run later: wandb sync {run.directory}"]
    assert (
        run.run_id,
        run.project,
        run.entity,
        run.group,
        run.name,
        run.resume,
        run.exit_code,
    ) == ("run7", "nested", "team", "g", "save", True, 0)
    assert run.config == DESCRIPTION and run.step_metrics == {"*": "iteration"}
    sets = metric_values(evaluation(3, "first"), 4, "first") | metric_values(
        evaluation(3, "second"), 4, "first"
    )
    expected = [{"iteration": number} | metric_values(step(number), 4) for number in (1, 2, 3)]
    assert run.values() == [
        *expected[:2],
        expected[2] | sets,
    ]  # rows of one iteration are one row, as with Megatron
    assert [row["_step"] for row in run.rows] == [1, 2, 3]
    assert (
        len(read_json_lines(tmp_path / "save" / "metrics.jsonl")) == 5
        and len(list((tmp_path / "tb").iterdir())) == 1
    )


def test_a_run_resumed_after_a_kill_is_one_run(tmp_path):
    for resumed, steps, mark in ((0, range(1, 8), 0.0), (4, range(5, 10), 0.5)):
        writers, _ = opened(tmp_path, resumed)
        for number in steps:
            writers.write(step(number, mark))
        writers.close()
    first, second = read_wandb_runs(tmp_path)
    assert first.run_id == second.run_id == "run7" and first.resume and second.resume
    assert [row["iteration"] for row in first.rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["iteration"] for row in second.rows] == [5, 6, 7, 8, 9]
    # wandb drops a row whose step does not rise; none is lost here, and the iteration is the x axis
    assert [row["_step"] for row in first.rows + second.rows] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
    ]
    assert second.values() == [
        {"iteration": number} | metric_values(step(number, 0.5), 4) for number in range(5, 10)
    ]


def online(monkeypatch, url: str) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def test_online_runs_are_sent_and_continued(tmp_path, monkeypatch):
    with wandb_server() as server:
        online(monkeypatch, server.url)
        for resumed, steps, mark in ((0, range(1, 6), 0.0), (3, range(4, 8), 0.5)):
            writers, logged = opened(tmp_path, resumed, wandb_mode="online")
            for number in steps:
                writers.write(step(number, mark))
            writers.close()
            continued = " continued" if resumed else ""
            assert logged == [
                f"wandb: run {tmp_path.name} (run7){continued}, {server.url}/team/nested/runs/run7"
            ]
        assert list(server.runs) == ["run7"] and server.finished == {"run7": 0}
        rows = server.rows("run7")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    sent = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    expected = [(number, 0.0) for number in range(1, 6)] + [(number, 0.5) for number in range(4, 8)]
    assert sent == [
        {"iteration": number} | metric_values(step(number, mark), 4) for number, mark in expected
    ]


def test_offline_runs_are_joined_by_wandb_sync(tmp_path, monkeypatch):
    for resumed, steps in ((0, range(1, 6)), (3, range(4, 8))):
        writers, _ = opened(tmp_path, resumed)
        for number in steps:
            writers.write(step(number))
        writers.close()
    with wandb_server() as server:
        online(monkeypatch, server.url)
        directories = sorted((tmp_path / "wandb").glob("offline-run-*"))
        done = subprocess.run(
            [Path(sys.executable).parent / "wandb", "sync", *directories],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(server.runs) == ["run7"]
        assert [(row["iteration"], row["_step"]) for row in server.rows("run7")] == [
            (1, 1),
            (2, 2),
            (3, 3),
            (4, 4),
            (5, 5),
            (4, 6),
            (5, 7),
            (6, 8),
            (7, 9),
        ]


def test_a_server_that_breaks_wandb_leaves_an_offline_run(tmp_path, monkeypatch):
    with wandb_server() as server:
        online(monkeypatch, server.url)
        writers, logged = opened(tmp_path, wandb_mode="online")
        process = process_of(writers)
        writers.write(step(1))
        time.sleep(2.0)
        process.kill()
        for number in range(2, 6):
            writers.write(step(number))
            time.sleep(0.6)
        writers.close()
    first, second = read_wandb_runs(tmp_path)
    assert (first.directory.name.split("-")[0], second.directory.name.split("-")[0]) == (
        "run",
        "offline",
    )
    assert logged[1:] == [
        f"wandb: stopped (its process ended). Send the rest later: wandb sync {first.directory}",
        f"wandb: continuing offline. Send the run later: wandb sync {second.directory}",
    ]
    # a report sent to the process before its end was noticed is in the JSON lines alone
    assert [row["iteration"] for row in second.rows] in (
        [2, 3, 4, 5],
        [3, 4, 5],
    ) and second.exit_code == 0


def test_online_without_a_key_continues_offline_without_a_prompt(tmp_path):
    started = time.monotonic()
    writers, logged = opened(tmp_path, wandb_mode="online")
    process_of(writers)
    assert time.monotonic() - started < 15
    for number in (1, 2):
        writers.write(step(number))
    writers.close()
    (run,) = read_wandb_runs(tmp_path)
    assert logged == [
        "wandb: not online (No API key configured. Use `wandb login` to log in.), continuing "
        "offline. "
        f"Send the run later: wandb sync {run.directory}"
    ]
    assert [row["iteration"] for row in run.rows] == [1, 2] and run.directory.name.startswith(
        "offline-run-"
    )


@pytest.mark.parametrize("server", ["refuses", "never answers"])
def test_without_network_nothing_waits(tmp_path, monkeypatch, server):
    monkeypatch.setattr(
        wandb_writer, "OFFLINE_SECONDS", wandb_writer.CLOSE_SECONDS - 3.0
    )  # gives up the server 3 s after close
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "never answers":
            listener.listen(50)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        started = time.perf_counter()
        writers, logged = opened(tmp_path, wandb_mode="online")
        seconds = [time.perf_counter() - started]
        for number in range(1, 201):
            started = time.perf_counter()
            writers.write(step(number))
            seconds.append(time.perf_counter() - started)
        assert max(seconds) < 1.0 and sorted(seconds)[100] < 0.005, max(seconds)
        started = time.monotonic()
        writers.close()
        assert time.monotonic() - started < wandb_writer.CLOSE_SECONDS + 1.0
    (run,) = read_wandb_runs(tmp_path)  # the files of the failed attempt are removed
    assert [row["iteration"] for row in run.rows] == list(range(1, 201)) and run.exit_code == 0
    assert (
        len(logged) == 1
        and logged[0].startswith("wandb: not online (")
        and logged[0].endswith(f"wandb sync {run.directory}")
    )
    assert KEY not in logged[0]
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
    ]


def test_wandb_not_installed_is_logged_once(tmp_path, monkeypatch):
    (tmp_path / "blocked" / "wandb").mkdir(parents=True)
    (tmp_path / "blocked" / "wandb" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'wandb'\")\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocked"), prepend=os.pathsep)
    writers, logged = opened(tmp_path / "save", wandb_mode="online")
    writers.write(step(1))
    deadline = time.monotonic() + 20
    while writers._writers[-1]._process is not None and time.monotonic() < deadline:
        writers._writers[-1]._advance()
        time.sleep(0.05)
    writers.write(step(2))
    writers.close()
    assert logged == [
        "wandb: not used (No module named 'wandb'; `pip install wandb` installs it). Training "
        "continues without it."
    ]
    assert (
        len(read_json_lines(tmp_path / "save" / "metrics.jsonl")) == 2
        and not (tmp_path / "save" / "wandb").exists()
    )


def test_a_mode_that_wandb_does_not_know_is_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    writers, logged = opened(tmp_path)
    writers.close()
    assert logged[0].startswith(
        "wandb: not online (WANDB_MODE: 'sometimes' is none of offline, online, disabled), "
        "continuing offline."
    )


def test_a_killed_run_loses_no_row(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from tests.system.test_monitoring import opened, process_of, step
writers, _ = opened(Path({str(tmp_path)!r}))
process_of(writers)
for number in range(1, 6):
    writers.write(step(number))
while writers._writers[-1]._queue:
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while wandb_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    (run,) = read_wandb_runs(tmp_path)
    assert [row["iteration"] for row in run.rows] == [1, 2, 3, 4, 5] and run.exit_code == 1


def test_signals_of_a_scheduler_do_not_end_wandb(tmp_path):
    writers, _ = opened(tmp_path)
    process = process_of(writers)
    for number, name in enumerate(("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"), 1):
        process.send_signal(getattr(signal, name))
        writers.write(step(number))
        time.sleep(0.05)
    writers.close()
    (run,) = read_wandb_runs(tmp_path)
    assert [row["iteration"] for row in run.rows] == [1, 2, 3, 4, 5] and run.exit_code == 0


def test_training_continues_when_wandb_dies(tmp_path):
    writers, logged = opened(tmp_path)
    process = process_of(writers)
    for number in range(1, 6):
        writers.write(step(number))
        if number == 3:
            time.sleep(2.5)  # wandb flushes its file every second
            process.kill()
        time.sleep(0.2)
    writers.close()
    (directory,) = (tmp_path / "wandb").glob("offline-run-*")
    assert logged == [
        f"wandb: offline. Send the run later: wandb sync {directory}",
        "wandb: stopped (its process ended). Training continues without it. Send the rest later: "
        f"wandb sync {directory}",
    ]
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 5
    assert [row["iteration"] for row in read_wandb_run(directory).rows] == [
        1,
        2,
    ]  # the third was still open to further values


def test_a_stuck_wandb_costs_the_oldest_reports_only(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_writer, "CLOSE_SECONDS", 2.0)
    monkeypatch.setattr(wandb_writer, "QUEUED_REPORTS", 50)
    writers, logged = opened(tmp_path)
    process = process_of(writers)
    process.send_signal(signal.SIGSTOP)
    slowest = 0.0
    for number in range(1, 1001):
        started = time.perf_counter()
        writers.write(step(number))
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 1.0
    started = time.monotonic()
    writers.close()
    assert time.monotonic() - started < 4
    (directory,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (
        logged[1]
        == f"wandb: did not finish within 2 s. Send the rest later: wandb sync {directory}"
    )
    assert logged[-1].startswith("wandb: it was too slow, ") and len(logged) in (3, 4)
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 1000


def test_no_process_is_left(tmp_path):
    writers, _ = opened(tmp_path)
    writers.write(step(1))
    writers.close()
    deadline = time.monotonic() + 10
    while wandb_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert wandb_processes() == []
