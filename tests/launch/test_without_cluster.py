"""Whole launches with stand-ins for ssh, SLURM and torchrun: what reaches a node word by word, and what is said of mistakes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, RUN, end_processes_in, processes_in, wait_for, write_site
from tests.support.launch_programs import said_to_torchrun, stand_ins, write_program
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
    """Returns a directory with spaces, a quote and a dollar sign in its name, with a run and a site file of two nodes in it."""
    path = folder / "it's a $place"
    path.mkdir()
    (path / "my run.yaml").write_text(RUN)
    for name in ("a", "b", "*"):
        (path / name).touch()
    write_site(path, PYTHON=folder / "bin" / "python", MASTER_PORT=free_port(), REMOTE_SHELL="ssh")
    return path


def launch(
    folder: Path, launcher: str, *words: object, **more: object
) -> subprocess.CompletedProcess:
    """Returns the finished launcher, started in the only directory in ``folder`` that has a site file."""
    place = next(folder.glob("*/site")).parent
    return subprocess.run(
        [ROOT / "slurm" / launcher, *map(str, words)],
        cwd=place,
        env=stand_ins(folder, **more),
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )


def over_ssh(
    folder: Path, hosts: str, *words: object, **more: object
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
        *words,
        **more,
    )


def job(
    folder: Path, *words: object, number: int = 17, **more: object
) -> subprocess.CompletedProcess:
    """Returns the finished script of a job on n0 and n1."""
    return launch(
        folder,
        "gpu.sbatch",
        "--site",
        "site",
        "my run.yaml",
        *words,
        SLURM_JOB_ID=number,
        SLURM_JOB_NODELIST="n[0-1]",
        **more,
    )


def check_words(folder: Path, place: Path, hosts: list[str]) -> None:
    """Looks whether every host got the words of the command line as they stood there, and its own rank."""
    said = said_to_torchrun(folder)
    assert sorted(said) == sorted(hosts)
    for rank, host in enumerate(hosts):
        at = said[host].index(f"{ROOT}/pretrain_sorted.py")
        assert said[host][at + 1 :] == ["--config", f"{place}/my run.yaml", *STRANGE]
        assert f"--node-rank={rank}" in said[host]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_words_and_names_reach_hosts_as_they_are(folder, place, strategy):
    """Hosts in a file as an editor under Windows leaves it, one with a user's name, which pdsh would take away, one that is an address."""
    write_site(
        place, PYTHON=folder / "bin" / "python", MASTER_PORT=free_port(), REMOTE_SHELL=strategy
    )
    (place / "hosts").write_bytes(
        b"# the first node first\r\ntrain@n1   # one\r\n\r\nfe80::2\r\n\r\n\r\n"
    )
    done = over_ssh(folder, "hosts", *STRANGE)
    assert done.returncode == 0, done.stdout + done.stderr
    check_words(folder, place, ["train@n1", "fe80::2"])
    assert {path.name for path in (place / "l o g s").glob("*.log")} == {
        "train@n1.log",
        "fe80::2.log",
    }


def test_words_reach_the_nodes_of_a_job_as_they_are(folder, place):
    done = job(folder, *STRANGE)
    assert done.returncode == 0, done.stdout + done.stderr
    check_words(folder, place, ["n0", "n1"])


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
    check_words(folder, place, ["n0", "n1"])


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (
            "far",
            'error: far: cannot be reached: far: Permission denied (publickey,password). Make "ssh -o BatchMode=yes',
        ),
        (
            "bare",
            "error: bare: has no directory {place}, in which the run works. Start it in one that all hosts share",
        ),
        (
            "empty",
            "error: empty: lacks a program (above). The project, {root}, and CONTAINER_COMMAND must be there on every host.",
        ),
    ],
)
def test_a_host_that_lacks_something_is_named(folder, place, host, reason):
    done = over_ssh(folder, f"n0,{host}")
    assert done.returncode == 1 and reason.format(place=place, root=ROOT) in done.stderr, (
        done.stdout + done.stderr
    )
    assert not said_to_torchrun(folder)


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
        and "error: n0, n0.cluster: are one machine by several names." in done.stderr
    ), done.stdout + done.stderr


def start(folder: Path, place: Path, hosts: str, project: Path = ROOT) -> subprocess.Popen:
    """Return a launcher over ssh, of ``project``, whose torchruns stay, once all hosts have started theirs."""
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
        lambda: len(said_to_torchrun(folder)) == len({"n0", "n1"} & set(hosts.split(","))),
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
    said = (folder / "console.out").read_text()
    assert (
        "error: deaf did not answer within 3 s; look there" in said
        and "nothing is left running" not in said
    ), said
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
    assert f"--master-port={port}" in said_to_torchrun(folder)["n0"]


@pytest.mark.parametrize(
    ("reason", "words", "fails", "status", "said"),
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
        ),  # started again it goes on from --save
    ],
)
def test_what_becomes_of_a_job_that_stopped(folder, place, reason, words, fails, status, said):
    (place / "save").mkdir()
    (place / "save" / "stopped.json").write_text(
        json.dumps({"step": 5, "train_iters": 9, "reason": reason})
    )
    done = job(folder, *words, REQUEUE_FAILS=fails)
    assert done.returncode == status, done.stdout + done.stderr
    assert said in done.stdout + done.stderr


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
