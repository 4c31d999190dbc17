"""Whole launches with stand-ins for ssh, SLURM and torchrun: arguments of nodes, and messages."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, RUN, end_processes_in, processes_in, wait_for, write_site
from tests.support.launch_programs import stand_ins, torchrun_arguments, write_program
from tests.support.ports import free_port

PDSH = pytest.mark.skipif(not shutil.which("pdsh"), reason="pdsh missing: apt-get install pdsh")
STRATEGIES = ["ssh", pytest.param("pdsh", marks=PDSH)]
STRANGE = [
    "--tensorboard-dir",
    'it\'s "a" = $HOME * \\ [ab] &',
    "--metrics-file=m n",
    "--lr",
    "1e-3",
]


@pytest.fixture
def place(folder) -> Path:
    """Return a directory with strange characters in its name, with a run and a site file in it."""
    path = folder / "it's a $place"
    path.mkdir()
    (path / "my run.yaml").write_text(RUN)
    for name in ("a", "b", "*"):
        (path / name).touch()
    write_site(path, PYTHON=folder / "bin" / "python", MASTER_PORT=free_port(), REMOTE_SHELL="ssh")
    return path


def launch(
    folder: Path, launcher: str, *arguments: object, **more: object
) -> subprocess.CompletedProcess:
    """Run a launcher in the only directory in ``folder`` with a site file; return its result."""
    place = next(folder.glob("*/site")).parent
    return subprocess.run(
        [ROOT / "slurm" / launcher, *map(str, arguments)],
        cwd=place,
        env=stand_ins(folder, **more),
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )


def over_ssh(
    folder: Path, hosts: str, *arguments: object, **more: object
) -> subprocess.CompletedProcess:
    return launch(
        folder,
        "launch_hosts.sh",
        "gpu",
        "--hosts",
        hosts,
        "--site",
        "site",
        "--logs",
        "l o g s",
        "my run.yaml",
        *arguments,
        **more,
    )


def job(
    folder: Path, *arguments: object, number: int = 17, **more: object
) -> subprocess.CompletedProcess:
    """Return the finished script of a job on n0 and n1."""
    return launch(
        folder,
        "gpu.sbatch",
        "--site",
        "site",
        "my run.yaml",
        *arguments,
        SLURM_JOB_ID=number,
        SLURM_JOB_NODELIST="n[0-1]",
        **more,
    )


def check_arguments(folder: Path, place: Path, hosts: list[str]) -> None:
    """Check that every host got the arguments of the command line unchanged, and its own rank."""
    output = torchrun_arguments(folder)
    assert sorted(output) == sorted(hosts)
    for rank, host in enumerate(hosts):
        at = output[host].index(f"{ROOT}/pretrain_sorted.py")
        assert output[host][at + 1 :] == ["--config", f"{place}/my run.yaml", *STRANGE]
        assert f"--node-rank={rank}" in output[host]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_arguments_and_names_reach_hosts_unchanged(folder, place, strategy):
    """Hosts in a file of Windows: one with a user's name, which pdsh would drop, and an address."""
    write_site(
        place, PYTHON=folder / "bin" / "python", MASTER_PORT=free_port(), REMOTE_SHELL=strategy
    )
    (place / "hosts").write_bytes(
        b"# the first node first\r\ntrain@n1   # one\r\n\r\nfe80::2\r\n\r\n\r\n"
    )
    done = over_ssh(folder, "hosts", *STRANGE)
    assert done.returncode == 0, done.stdout + done.stderr
    check_arguments(folder, place, ["train@n1", "fe80::2"])
    assert {path.name for path in (place / "l o g s").glob("*.log")} == {
        "train@n1.log",
        "fe80::2.log",
    }


def test_arguments_reach_the_nodes_of_a_job_unchanged(folder, place):
    done = job(folder, *STRANGE)
    assert done.returncode == 0, done.stdout + done.stderr
    check_arguments(folder, place, ["n0", "n1"])


def test_what_is_printed_can_be_pasted(folder, place):
    write_site(place, PYTHON=folder / "bin" / "python", REMOTE_SHELL="ssh")
    done = launch(
        folder,
        "launch_hosts.sh",
        "gpu",
        "--print",
        "--hosts",
        "n0,n1",
        "--site",
        "site",
        "my run.yaml",
        *STRANGE,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[1:3]:
        command = line.replace("attend", "train")  # which does not end with standard input
        pasted = subprocess.run(
            ["bash", "-c", command],
            env=stand_ins(folder),
            capture_output=True,
            text=True,
            check=False,
        )
        assert pasted.returncode == 0, pasted.stdout + pasted.stderr
    check_arguments(folder, place, ["n0", "n1"])


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (
            "far",
            "error: far: cannot be reached: far: Permission denied (publickey,password). Make "
            '"ssh -o BatchMode=yes',
        ),
        (
            "bare",
            "error: bare: has no directory {place}, the run's working directory. Start the run in "
            "one that all hosts share",
        ),
        (
            "empty",
            "error: empty: lacks a program (above). The project, {root}, and CONTAINER_COMMAND "
            "must exist on every host.",
        ),
    ],
)
def test_a_host_that_lacks_something_is_named(folder, place, host, reason):
    done = over_ssh(folder, f"n0,{host}")
    assert done.returncode == 1 and reason.format(place=place, root=ROOT) in done.stderr, (
        done.stdout + done.stderr
    )
    assert not torchrun_arguments(folder)


def test_one_machine_by_two_names(folder, place):
    write_site(
        place,
        PYTHON=folder / "bin" / "python",
        MASTER_PORT=free_port(),
        REMOTE_SHELL="ssh",
        ONE_MACHINE="no",
    )
    done = over_ssh(folder, "n0,n0.cluster", "--save", "none", "--load", "none")
    assert (
        done.returncode == 1
        and "error: n0, n0.cluster: are several names of one machine." in done.stderr
    ), done.stdout + done.stderr


def start(folder: Path, place: Path, hosts: str, project: Path = ROOT) -> subprocess.Popen:
    """Return a launcher over ssh, of ``project``, after all hosts have started long torchruns."""
    command = [
        project / "slurm" / "launch_hosts.sh",
        "gpu",
        "--hosts",
        hosts,
        "--site",
        "site",
        "--logs",
        "logs",
        "my run.yaml",
    ]
    with open(folder / "console.out", "w") as console:
        launcher = subprocess.Popen(
            command,
            cwd=place,
            env=stand_ins(folder, STAYS="yes"),
            stdout=console,
            stderr=subprocess.STDOUT,
        )
    wait_for(
        "torchrun",
        lambda: len(torchrun_arguments(folder)) == len({"n0", "n1"} & set(hosts.split(","))),
        60,
        folder,
    )
    return launcher


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_outlives_a_launcher_that_is_killed(folder, place, strategy):
    write_site(
        place, PYTHON=folder / "bin" / "python", MASTER_PORT=free_port(), REMOTE_SHELL=strategy
    )
    launcher = start(folder, place, "n0,n1")
    assert any("sleep 300" in name for name in processes_in(place))
    launcher.kill()
    launcher.wait()
    wait_for("the end of all", lambda: not processes_in(place), 30, folder)


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_launcher_that_waits_starts_no_program(folder, place, strategy):
    """A Ctrl-C at the moment at which one ends would be lost on bash."""
    write_site(
        place, PYTHON=folder / "bin" / "python", MASTER_PORT=free_port(), REMOTE_SHELL=strategy
    )
    launcher = start(folder, place, "n0,n1")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    wait_for(
        "what shows the first host's log, the last to start",
        lambda: any(
            Path(f"/proc/{pid}/comm").read_text() == "tail\n"
            for pid in children.read_text().split()
        ),
        30,
        folder,
    )
    seen = set()
    for _ in range(300):
        seen.add(children.read_text())
        time.sleep(0.005)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=90) == 130
    assert len(seen) == 1, seen


def test_a_host_that_does_not_end_is_named(folder, place, quick):
    launcher = start(folder, place, "n0,deaf", quick)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=90) == 130
    output = (folder / "console.out").read_text()
    assert (
        "error: deaf did not answer within 3 s; look there" in output
        and "nothing is left running" not in output
    ), output
    end_processes_in(folder, 0)  # the stand-in for an ssh to it still waits


@PDSH
def test_a_pdsh_that_does_not_work_ends_the_launch(folder, place):
    write_site(place, PYTHON=folder / "bin" / "python", REMOTE_SHELL="pdsh")
    write_program(folder / "bin" / "pdsh", "echo 'module path insecure' >&2; exit 1")
    done = over_ssh(folder, "n0,n1")
    assert done.returncode == 1 and "module path insecure" in done.stderr
    assert (
        "error: pdsh ended before the hosts did." in done.stderr
        and "REMOTE_SHELL=ssh" in done.stderr
    )


def test_a_job_whose_first_node_is_loopback_or_whose_nodes_do_not_match(folder, place):
    write_site(place, PYTHON=folder / "bin" / "python", ONE_MACHINE="no")
    done = job(folder, NODE_ADDR="127.0.0.1")
    assert (
        done.returncode == 2
        and "MASTER_ADDR '127.0.0.1' (NodeAddr of n0) is empty or this host itself" in done.stderr
    )
    write_site(place, PYTHON=folder / "bin" / "python", DEVICES_PER_NODE=4)
    done = job(folder)
    assert done.returncode == 2 and "2 nodes (of job 17) x 4 devices are 8 processes" in done.stderr


@pytest.mark.parametrize(("number", "port"), [(17, 20017), (12000, 20000), (91234567, 30567)])
def test_the_port_of_a_job_is_none_that_the_kernel_gives_away(folder, place, number, port):
    write_site(place, PYTHON=folder / "bin" / "python")
    done = job(folder, number=number)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"--master-port={port}" in torchrun_arguments(folder)["n0"]


@pytest.mark.parametrize(
    ("reason", "arguments", "fails", "status", "output"),
    [
        ("SIGUSR1", (), "", -9, "requeue 17"),
        ("SIGUSR1", (), "yes", 75, "job 17 cannot be requeued. Submit the same command again"),
        ("--exit-interval 5", (), "", 0, "stopped early, not requeued"),
        ("SIGUSR1", ("--finetune",), "", 0, "stopped early, not requeued"),
        (
            "SIGUSR1",
            ("--load", "none"),
            "",
            -9,
            "requeue 17",
        ),  # started again it resumes from --save
    ],
)
def test_what_becomes_of_a_job_that_stopped(
    folder, place, reason, arguments, fails, status, output
):
    (place / "save").mkdir()
    (place / "save" / "stopped.json").write_text(
        json.dumps({"step": 5, "train_iters": 9, "reason": reason})
    )
    done = job(folder, *arguments, REQUEUE_FAILS=fails)
    assert done.returncode == status, done.stdout + done.stderr
    assert output in done.stdout + done.stderr


def test_a_login_node_without_slurm_or_with_a_python_that_needs_modules(folder, place):
    write_program(
        folder / "bin" / "broken",
        "echo 'libpython3.11.so: cannot open shared object file' >&2; exit 127",
    )
    write_site(place, PYTHON=folder / "bin" / "broken")
    (folder / "few").mkdir()
    for name in (
        "bash",
        "dirname",
        "basename",
        "realpath",
        "sed",
        "head",
        "sort",
        "paste",
        "awk",
        "env",
    ):
        (folder / "few" / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [ROOT / "slurm" / "gpu.sbatch", "--site", "site", "my run.yaml"],
        cwd=place,
        text=True,
        capture_output=True,
        check=False,
        env={"PATH": str(folder / "few")},
    )
    assert done.returncode == 2 and done.stderr.startswith(
        "error: there is no command sbatch here. Run this on a login node"
    ), done.stderr


def test_a_container_sees_the_folder_of_the_run(folder, place):
    (folder / "runs").mkdir()
    (folder / "runs" / "run.yaml").write_text(RUN)
    write_site(place, PYTHON=sys.executable, CONTAINER_IMAGE="/i.sqsh")
    done = launch(folder, "gpu.sbatch", "--print", "--site", "site", "../runs/run.yaml")
    assert done.returncode == 0 and f"{folder}/runs:{folder}/runs" in done.stdout, (
        done.stdout + done.stderr
    )
