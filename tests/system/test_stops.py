"""Runs that are stopped, run out of time, or lose their launcher or a peer; with real signals."""

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_sorted.monitoring.json_lines import read_json_lines
from tests.support.command_line import pretrain
from tests.support.commands import run_command, start_command
from tests.support.preloaded.session import stand_in
from tests.system.test_failures import last_block
from tests.system.test_pretrain import untimed

RUN = (
    "--config",
    "run.yaml",
    "--eval-interval",
    "none",
    "--valid-data-path",
    "--split",
    "100,0",
    "--lr-decay-iters",
    "1000",
    "--load",
    "save",
    "--save",
    "save",
)


def start(
    folder: Path, *arguments: object, processes: int = 2, cold: bool = False
) -> subprocess.Popen:
    """Start a run of many steps and return it once it has done its first ones.

    torchrun is a process of its own, with the ranks as its children.
    """
    with open(folder / "log", "w") as log:
        process = start_command(
            "pretrain_sorted.py",
            *RUN,
            "--train-iters",
            100000,
            *arguments,
            cwd=folder,
            processes=processes,
            cold=cold or processes > 0,
            variables={} if cold else {"PYTHON_EXEC": stand_in()},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    metrics = folder / "save" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
        time.sleep(0.05)
    return process


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(launcher.pid).children()
        if "pretrain_sorted.py" in " ".join(child.cmdline())
    ]


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    for name in ("data", "run.yaml"):
        (tmp_path / name).symlink_to(prepared / name)
    return tmp_path


def check_stopped(folder: Path, reason: str) -> int:
    """Check that the run has saved, stopped and reported why; return the step."""
    stop = json.loads((folder / "save" / "stopped.json").read_text())
    step = stop["step"]
    assert stop == {"step": step, "train_iters": 100000, "reason": reason} and step >= 3
    assert (folder / "save" / "latest_checkpointed_iteration.txt").read_text() == str(step)
    lines = (folder / "log").read_text().splitlines()
    assert lines.count(f"stopping at step {step} of 100000: {reason}") == 1
    assert sum(line.startswith(f"saved save/iter_{step:07d} in ") for line in lines) == 1
    assert read_json_lines(folder / "save" / "metrics.jsonl")[-1]["step"] == step
    return step


def test_usr1_to_the_ranks_saves_and_ends_well_under_torchrun(folder):
    launcher = start(folder)
    for number, rank in enumerate(ranks_of(launcher)):
        # a scheduler does not reach all ranks at one time, and not every rank needs a signal
        time.sleep(0.2 * number)
        if rank.is_running():
            rank.send_signal(signal.SIGUSR1)
    assert launcher.wait(timeout=60) == 0, (folder / "log").read_text()
    step = check_stopped(folder, "SIGUSR1")
    # the same command resumes from there
    lines = pretrain(2, folder, *RUN, "--train-iters", step + 1)
    assert any(line.startswith(f"loaded save/iter_{step:07d}: step {step}, ") for line in lines)
    assert not (folder / "save" / "stopped.json").exists()


def test_term_to_torchrun_saves(folder):
    launcher = start(folder)
    launcher.terminate()
    assert launcher.wait(timeout=60) != 0  # torchrun's own answer to SIGTERM
    check_stopped(folder, "SIGTERM")


def test_term_without_a_launcher_ends_with_the_requeue_status(folder):
    process = start(folder, "--pipeline-model-parallel-size", 1, processes=0)
    process.terminate()
    assert process.wait(timeout=60) == 75, (folder / "log").read_text()
    check_stopped(folder, "SIGTERM")


@pytest.mark.parametrize(
    ("arguments", "step", "reason"),
    [
        (("--exit-interval", 3), 3, "--exit-interval 3"),
        (("--exit-duration-in-mins", 0.0001), 1, "--exit-duration-in-mins 0.0001"),
    ],
)
def test_a_run_stops_as_its_settings_require_and_resumes_as_if_it_had_not(
    folder, arguments, step, reason
):
    whole = (
        *RUN,
        "--train-iters",
        4,
        "--metrics-file",
        "whole.jsonl",
        "--save",
        "whole",
        "--load",
        "whole",
    )
    pretrain(2, folder, *whole)
    printed = pretrain(2, folder, *RUN, "--train-iters", 4, *arguments)
    assert f"stopping at step {step} of 4: {reason}" in printed
    assert json.loads((folder / "save" / "stopped.json").read_text()) == {
        "step": step,
        "train_iters": 4,
        "reason": reason,
    }
    pretrain(2, folder, *RUN, "--train-iters", 4)
    expected, resumed = (
        read_json_lines(folder / name) for name in ("whole.jsonl", "save/metrics.jsonl")
    )
    assert [untimed(line) for line in resumed] == [untimed(line) for line in expected]


def test_a_frozen_rank_is_named_and_ends_the_job(folder):
    launcher = start(folder, "--hang-timeout-minutes", 0.2, cold=True)
    victim = next(rank for rank in ranks_of(launcher) if rank.environ()["RANK"] == "1")
    victim.suspend()
    began = time.monotonic()
    assert launcher.wait(timeout=120) != 0
    # 12 s until it counts as a hang, 5 s to judge, and up to 30 s that torchrun waits for a frozen
    # process
    assert time.monotonic() - began < 90
    log = (folder / "log").read_text()
    block = last_block(log)
    assert "error: no progress for " in block, log
    assert f"process {victim.pid}) is silent (stopped, dead or cut off), last seen in " in block, (
        block
    )
    assert "Traceback" not in block and "Connection" not in block


def test_ranks_do_not_outlive_their_launcher(folder):
    launcher = start(folder, "--hang-timeout-minutes", 0.2, cold=True)
    ranks = ranks_of(launcher)
    launcher.kill()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    for process in alive:
        process.kill()
    assert not alive, "they would still save beside the job that was started in their place"


def test_too_many_steps_that_are_not_finite_stop_the_run_and_save_nothing(folder):
    done = run_command(
        "pretrain_sorted.py",
        *RUN,
        "--pipeline-model-parallel-size",
        1,
        "--train-iters",
        20,
        "--lr",
        "1e30",
        "--clip-grad",
        0,
        "--save-interval",
        1,
        "--nonfinite-steps-allowed",
        2,
        cwd=folder,
    )
    assert done.returncode == 1
    skipped = [line for line in done.stdout.splitlines() if " skipped: " in line]
    assert (
        len(skipped) == 2
        and skipped[0].endswith("(1 in a row, 2 allowed)")
        and skipped[1].endswith("(2 in a row, 2 allowed)")
    )
    assert all(
        "of exit 1 not finite on rank 0; " in line and "of exit 4 not finite on rank 0" in line
        for line in skipped
    )
    step = int(skipped[0].split()[1])
    assert (
        done.stderr.startswith(f"error: step {step + 2}: ")
        and "--nonfinite-steps-allowed is 2" in done.stderr
    )
    saved = sorted(path.name for path in (folder / "save").glob("iter_*"))
    assert saved == [f"iter_{number:07d}" for number in range(1, step)], "before the first bad step"
    metrics = read_json_lines(folder / "save" / "metrics.jsonl")
    assert sum(line["nonfinite"] for line in metrics) == 2 and metrics[step - 2]["nonfinite"] == 0
