"""The doctor on this machine: with working and broken libraries, in good and in broken jobs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import command_line, environment, run, run_command
from tests.support.ports import free_port
from tests.support.preloaded.session import stand_in
from tests.system.conftest import ROOT

DOCTOR = str(ROOT / "tools" / "doctor.py")
BROKEN_NPU = (
    'raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")\n'
)


def with_path(*path: Path, **variables: object) -> dict[str, str]:
    """Return an environment with folders before the project on the path, and variables."""
    return environment(PYTHONPATH=":".join(map(str, (*path, ROOT))), **variables)


def run_doctor(
    folder: Path, *arguments: object, python: str = sys.executable, env: dict[str, str]
) -> tuple[int, dict[str, dict], str]:
    """Return the doctor's status, findings by name (the worst of each) and error output here.

    It is a process of its own, since it checks what can be imported.
    """
    done = run(
        [python, DOCTOR, "--json", "--folder", str(folder), *map(str, arguments)],
        cwd=folder,
        env=env,
    )
    return done.returncode, findings_of(done.stdout, done.stderr), done.stderr


def findings_of(text: str, errors: str) -> dict[str, dict]:
    """Return the findings in a doctor's JSON by name, the worst of each name."""
    assert text.startswith("{"), errors
    findings = json.loads(text)["findings"]
    order = ("OK", "WARN", "FAIL")
    return {
        finding["name"]: finding
        for finding in sorted(findings, key=lambda finding: order.index(finding["verdict"]))
    }


def write_torch_npu(folder: Path, version: str) -> Path:
    """Write a torch_npu that fails as without CANN, installed so that torch loads it by itself."""
    (folder / "torch_npu").mkdir(parents=True)
    (folder / "torch_npu" / "__init__.py").write_text(BROKEN_NPU)
    info = folder / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return folder


def write_megatron(folder: Path, version: tuple[int, int, int]) -> Path:
    """Write a megatron-core of another version, as in a checkout."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("")
    names = zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
    (core / "package_info.py").write_text("".join(f"{name} = {number}\n" for name, number in names))
    (core / "parallel_state.py").write_text("")
    return folder


def test_this_machine_and_a_run_that_fits_it(tmp_path):
    status, findings, _ = run_doctor(
        tmp_path, ROOT / "examples" / "quickstart.yaml", env=with_path()
    )
    assert status == 0, findings
    assert (
        findings["torch"]["verdict"]
        == findings["megatron-core"]["verdict"]
        == findings["settings"]["verdict"]
        == "OK"
    )
    assert (
        str(tmp_path) in findings["run folder"]["value"]
        and "MiB/s" in findings["run folder"]["value"]
    )
    assert not list(tmp_path.iterdir())


def test_a_torch_npu_without_cann_is_named_with_its_library(tmp_path):
    status, findings, _ = run_doctor(
        tmp_path, env=with_path(write_torch_npu(tmp_path / "path", "2.12.0"))
    )
    assert status == 1
    assert findings["torch"]["verdict"] == "OK"  # it is imported without torch_npu, as in training
    assert (
        "libhccl.so is missing" in findings["torch_npu"]["value"]
        and "pip uninstall torch_npu" in findings["torch_npu"]["remedy"]
    )
    assert "2.12.0 beside torch 2." in findings["torch_npu version"]["value"]
    assert (
        findings["megatron-core"]["verdict"] == "OK" and findings["run folder"]["verdict"] != "FAIL"
    )


def test_a_second_megatron_on_the_path_is_the_one_that_is_judged(tmp_path):
    status, findings, _ = run_doctor(
        tmp_path, env=with_path(write_megatron(tmp_path / "checkout", (0, 11, 0)))
    )
    assert status == 1 and findings["megatron-core"]["verdict"] == "FAIL"
    assert (
        f"taken: 0.11.0 in {tmp_path / 'checkout'}; also: 0.16."
        in findings["megatron-core"]["value"]
    )
    assert f"Take {tmp_path / 'checkout'} out of PYTHONPATH" in findings["megatron-core"]["remedy"]


def test_a_python_without_packages_is_checked(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    status, findings, _ = run_doctor(
        tmp_path,
        ROOT / "examples" / "quickstart.yaml",
        python=python,
        env={"PATH": os.environ["PATH"]},
    )
    assert status == 1
    assert (findings["torch"]["value"], findings["megatron-core"]["value"]) == (
        "not installed",
        "not found",
    )
    assert "hangs for ever" in findings["psutil"]["value"]
    assert "cannot be read without" in findings["run file"]["value"]


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        (["nowhere.yaml"], {}, "nowhere.yaml: no such file"),
        (["--network"], {}, "--network: this is one process"),
        ([], {"RANK": 0, "WORLD_SIZE": 2}, "MASTER_ADDR and MASTER_PORT unset"),
        ([], {"RANK": 2, "WORLD_SIZE": 2}, "RANK: 2 is not below WORLD_SIZE 2"),
        (["--device", "abacus"], {}, "invalid choice: 'abacus'"),
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments, given, message, tmp_path):
    done = run_command("tools/doctor.py", *arguments, cwd=tmp_path, **given)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


class Job:
    """Processes of one job on this host, with the environment that a scheduler gives them.

    Those with a path of their own, and those that a test stops, are real processes (``cold``).
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        ranks: list[int],
        *arguments: object,
        per_node: int,
        path: dict[int, Path] | None = None,
        cold: tuple[int, ...] = (),
    ):
        self.folder, self.processes, port = folder, {}, free_port()
        for rank in ranks:
            own = path is not None and rank in path
            env = with_path(
                *([path[rank]] if own else []),
                RANK=rank,
                WORLD_SIZE=size,
                LOCAL_RANK=rank % per_node,
                LOCAL_WORLD_SIZE=per_node,
                GROUP_RANK=rank // per_node,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            with open(folder / f"out.{rank}", "w") as out, open(folder / f"err.{rank}", "w") as err:
                command = command_line(
                    "tools/doctor.py",
                    "--json",
                    "--device",
                    "cpu",
                    "--folder",
                    folder,
                    *arguments,
                    cold=own or rank in cold,
                )
                self.processes[rank] = subprocess.Popen(command, env=env, stdout=out, stderr=err)

    def wait_for(self, text: str, rank: int = 0) -> None:
        """Wait until a rank has printed a text."""
        until = time.monotonic() + 200
        while text not in (self.folder / f"err.{rank}").read_text():
            assert time.monotonic() < until and self.processes[rank].poll() is None, (
                self.folder / f"err.{rank}"
            ).read_text()
            time.sleep(0.02)

    def findings(self) -> tuple[int, dict[str, dict]]:
        """Return the status of rank 0 and its findings; only rank 0 may have printed any."""
        try:
            status = self.processes[0].wait(timeout=200)
            for rank, process in self.processes.items():
                process.send_signal(signal.SIGCONT)
                if rank:
                    assert not (self.folder / f"out.{rank}").read_text()
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()
        return status, findings_of(
            (self.folder / "out.0").read_text(), (self.folder / "err.0").read_text()
        )


def test_a_job_of_two_nodes_is_measured(tmp_path):
    status, findings = Job(tmp_path, 4, range(4), per_node=2).findings()
    assert (
        status == 1 and findings["MASTER_ADDR"]["verdict"] == "FAIL"
    )  # the only thing wrong: both nodes are this host
    assert {name for name, finding in findings.items() if finding["verdict"] == "FAIL"} <= {
        "MASTER_ADDR",
        "host name",
    }
    assert (
        findings["sums"]["value"].startswith("correct: ")
        and "on 4 processes" in findings["sums"]["value"]
    )
    assert (
        "4 processes" not in findings["same versions"]["value"]
        and "megatron-core 0.16" in findings["same versions"]["value"]
    )
    assert "GB/s" in findings["all-reduce, all processes"]["value"]
    assert (
        "2 pairs" in findings["messages within a node"]["value"]
        and "2 pairs" in findings["messages across nodes"]["value"]
    )
    assert (
        "seen on all 2 nodes" in findings["shared folder"]["value"]
        or findings["shared folder"]["verdict"] == "WARN"
    )
    figures = json.loads((tmp_path / "out.0").read_text())["network"]
    assert {figure["rank"] for figure in figures} == {0, 1, 2, 3} and not any(
        figure.get("wrong") for figure in figures
    )


def test_a_folder_that_cannot_be_written_ends_the_test_of_all_processes(tmp_path):
    status, findings = Job(
        tmp_path, 2, range(2), "--folder", "/proc", "--limit-seconds", 30, per_node=1
    ).findings()
    assert status == 1 and "network test" not in findings and "sums" in findings
    assert findings["shared folder"]["verdict"] == "FAIL" and findings["shared folder"][
        "value"
    ].startswith("/proc: ")


def test_a_process_that_never_comes_is_named(tmp_path):
    status, findings = Job(tmp_path, 3, [0, 2], "--limit-seconds", 20, per_node=2).findings()
    assert status == 1 and findings["processes"]["verdict"] == "FAIL"
    host = os.uname().nodename
    assert f"1 of 3 did not come within 20 s: rank 1 (on {host})" in findings["processes"]["value"]


def test_other_versions_on_one_process_are_named(tmp_path):
    other = write_megatron(tmp_path / "checkout", (0, 12, 1))
    status, findings = Job(tmp_path, 3, range(3), per_node=3, path={2: other}).findings()
    assert status == 1
    assert findings["same megatron-core"]["verdict"] == "FAIL"
    assert (
        findings["same megatron-core"]["value"]
        == f"0.16.1 on 2 processes; 0.12.1 on rank 2 on {os.uname().nodename}"
    )


@pytest.mark.long
def test_a_node_without_a_working_torch_reports_itself_and_is_missed(tmp_path):
    (tmp_path / "path" / "torch").mkdir(parents=True)
    (tmp_path / "path" / "torch" / "__init__.py").write_text(
        'raise ImportError("libtorch_cpu.so: file too short")\n'
    )
    job = Job(tmp_path, 2, range(2), "--limit-seconds", 30, per_node=1, path={1: tmp_path / "path"})
    assert job.processes[1].wait(timeout=200) == 1
    message = (tmp_path / "err.1").read_text()
    assert (
        "FAIL  torch " in message
        and "libtorch_cpu.so: file too short" in message
        and "FAIL  network test " in message
    )
    status, findings = job.findings()
    assert (
        status == 1
        and "rank 1 (node 1, no process of which came)" in findings["processes"]["value"]
    )


@pytest.mark.parametrize(
    "blow", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.long)]
)
def test_a_process_that_stops_or_dies_in_the_test_is_named(tmp_path, blow):
    job = Job(tmp_path, 3, range(3), "--limit-seconds", 15, per_node=3, cold=(1,))
    job.wait_for("network test, part 2")
    job.processes[1].send_signal(blow)
    status, findings = job.findings()
    assert status == 1 and findings["network test"]["verdict"] == "FAIL"
    assert (
        f"the others wait for rank 1 on {os.uname().nodename}, without a sign of life"
        in findings["network test"]["value"]
    )


@pytest.mark.long
def test_under_torchrun_one_table_is_printed(tmp_path):
    done = run_command(
        "tools/doctor.py", "--device", "cpu", "--folder", tmp_path, cwd=tmp_path, processes=3
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("OK    sums ") for line in lines) == 1
    assert lines[-1].endswith(" 0 that will not work")
    assert (
        len({re.match(r"\S+ +\S.*?  +(?=\S)", line).end() for line in lines[:-1] if line[0] != " "})
        == 1
    )


@pytest.mark.long
def test_a_process_killed_under_torchrun_is_named_before_the_launcher_ends_the_others(tmp_path):
    script = tmp_path / "one_dies.sh"
    script.write_text(
        '#!/bin/sh\n[ "$RANK" = 1 ] && sleep 60 && exit 7\n'
        f"exec {stand_in()} {DOCTOR} --json --device cpu --folder {tmp_path} --limit-seconds 300\n"
    )
    script.chmod(0o755)
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--no-python",
        "--nproc-per-node",
        "3",
    ]
    done = run([stand_in(), *launcher, str(script)], cwd=tmp_path, env=environment(), seconds=280)
    assert done.returncode == 1
    findings = findings_of(done.stdout, done.stderr)
    assert "rank 1" in findings["processes"]["value"]
