"""Jobs of a real SLURM on two nodes: success, failure, time limits, preemption."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from lab.reliability.compare import differing_tensors
from tests.launch.conftest import (
    PYTHON,
    ROOT,
    RUN,
    STEPS,
    hold_until_warned,
    last_step,
    wait_for,
    workers,
    write_site,
)
from tests.support.slurm_cluster import SlurmCluster


def submit(
    cluster: SlurmCluster,
    folder: Path,
    *arguments: object,
    project: Path = ROOT,
    launcher: str = "gpu",
) -> str:
    """Submit the run in ``folder`` with the scripts of ``project`` and return the job's number."""
    done = subprocess.run(
        [
            project / "slurm" / f"{launcher}.sbatch",
            "--site",
            "site",
            "run.yaml",
            *map(str, arguments),
        ],
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
        env=cluster.job_environment(),
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def printed(folder: Path, job: str) -> str:
    return (folder / f"run-{job}.out").read_text()


def wait_for_state(
    cluster: SlurmCluster, folder: Path, job: str, *states: str, seconds: float = 300
) -> None:
    wait_for(f"job {job} {'/'.join(states)}", lambda: cluster.state(job) in states, seconds, folder)


def finish(cluster: SlurmCluster, folder: Path, job: str) -> None:
    """Wait for the requeued job, without its two minutes, and check that it resumed at its stop."""
    wait_for_state(cluster, folder, job, "PENDING")
    word = json.loads((folder / "save" / "stopped.json").read_text())
    assert word["reason"] == "SIGUSR1" and 1 <= word["step"] < STEPS
    assert f"stopped early, requeueing: {json.dumps(word)}" in printed(folder, job)
    time.sleep(2)  # nodes refuse a start in the second of the requeue, "Job credential revoked"
    cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=10")
    wait_for_state(cluster, folder, job, "COMPLETED")
    assert cluster.fields(job)["Restarts"] == "1"
    assert f"loaded save/iter_{word['step']:07d}: step {word['step']}, " in printed(folder, job)


@pytest.fixture(scope="session")
def whole(slurm, tmp_path_factory) -> Path:
    """Return the folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "run.yaml").write_text(RUN)
    write_site(folder)
    job = submit(slurm, folder)
    wait_for_state(slurm, folder, job, "COMPLETED", "FAILED")
    assert slurm.state(job) == "COMPLETED", printed(folder, job)
    return folder


def check_same_weights(whole: Path, folder: Path) -> None:
    count, differing = differing_tensors(whole / "save", folder / "save", STEPS)
    assert count > 10 and not differing


def test_a_job_on_two_nodes_completes(whole):
    log = next(whole.glob("*.out")).read_text()
    assert "2 nodes agree: device cpu, " in log and "2 processes on cpu: tp 1 x pp 1 x dp 2" in log
    assert last_step(whole) == STEPS and not (whole / "save" / ".launch_token").exists()


def test_a_killed_worker_ends_the_job(folder, cluster, tiny):
    job = submit(cluster, folder, "--train-iters", 100000, project=tiny)
    wait_for("three steps", lambda: last_step(folder) >= 3, 240, folder)
    workers(folder)[1].kill()
    began = time.monotonic()
    wait_for_state(cluster, folder, job, "FAILED", seconds=60)
    assert time.monotonic() - began < 60
    assert "error: the run ended with status " in printed(folder, job) and not workers(folder)


@pytest.mark.long
def test_a_killed_worker_is_restarted_where_the_site_says_so(folder, cluster):
    write_site(folder, MAX_RESTARTS=1)
    job = submit(cluster, folder, "--save-interval", 20, "--train-iters", 400)
    wait_for("a checkpoint", lambda: last_step(folder) >= 25, 240, folder)
    workers(folder)[1].kill()
    wait_for_state(cluster, folder, job, "COMPLETED", "FAILED")
    assert cluster.state(job) == "COMPLETED", printed(folder, job)
    assert "--load save holds no checkpoint: starting afresh" in printed(
        folder, job
    ) and "loaded save/iter_00000" in printed(folder, job)


def test_a_job_is_saved_before_its_time_limit_and_resumes(folder, cluster, whole, quick):
    write_site(
        folder, TIME_LIMIT=5, SAVE_SECONDS=299
    )  # SLURM looks every half minute, and warns up to a minute early
    job = submit(cluster, folder, project=quick)
    hold_until_warned(folder, 150)
    finish(cluster, folder, job)
    check_same_weights(whole, folder)


@pytest.mark.long
def test_a_preempted_job_is_saved_and_resumes(folder, cluster, whole, quick):
    others = []

    def evict() -> None:
        others.append(
            cluster.command(
                "sbatch",
                "--parsable",
                "--partition=high",
                "--nodes=2",
                "--exclusive",
                f"--output={folder}/other.out",
                "--wrap",
                "sleep 1",
            )
        )

    job = submit(cluster, folder, project=quick)
    hold_until_warned(folder, 150, evict)
    wait_for_state(cluster, folder, others[0], "COMPLETED")
    finish(cluster, folder, job)
    check_same_weights(whole, folder)


def test_a_node_with_another_torch_is_named(folder, cluster):
    other = folder / "torch-9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    python = folder / "python"
    python.write_text(f"""#!/bin/bash
[ "$SLURMD_NODENAME" != n1 ] || export PYTHONPATH={folder}:$PYTHONPATH
exec {PYTHON} "$@"
""")
    python.chmod(0o755)
    write_site(folder, PYTHON=python)
    job = submit(cluster, folder)
    wait_for_state(cluster, folder, job, "FAILED")
    match = re.search(
        r"error: torch differs between nodes: (.*). Make it the same on all.", printed(folder, job)
    )
    assert match and "9.9 on n1" in match[1].split("; ") and re.search(r"\S+ on n0", match[1]), (
        printed(folder, job)
    )
    assert not (folder / "save" / "metrics.jsonl").exists()


def test_the_launcher_for_npus_sources_set_env_on_every_node_inside_the_container(
    folder, cluster, tiny
):
    (folder / "set_env.sh").write_text(f"touch {folder}/sourced.$SLURMD_NODENAME.$INSIDE\n")
    write_site(
        folder,
        DEVICE_REQUEST="--gres=npu:1",
        SET_ENV_FILES=folder / "set_env.sh",
        CONTAINER_COMMAND="env INSIDE=yes",
    )
    job = submit(cluster, folder, "--train-iters", 2, project=tiny, launcher="npu")
    wait_for_state(cluster, folder, job, "COMPLETED", "FAILED")
    assert cluster.state(job) == "COMPLETED", printed(folder, job)
    assert {path.name for path in folder.glob("sourced.*")} == {"sourced.n0.yes", "sourced.n1.yes"}
