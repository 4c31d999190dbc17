"""The reports of a node, their check, and the environment of training: slurm/node.sh alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sorted.checkpoint.lock import DirectoryLock
from tests.launch.conftest import ROOT
from tests.support.clean_environment import clean_environment
from tests.support.launch_programs import write_program
from tests.support.ports import free_port


def node(
    folder: Path, mode: str, rank: int = 0, **variables: object
) -> subprocess.CompletedProcess:
    """Run node.sh with the variables of the launchers and further ones, and return its result."""
    environment = {
        "SORTED_KIND": "gpu",
        "SORTED_ROOT": ROOT,
        "SORTED_NODES": 2,
        "SORTED_DEVICES": 1,
        "SORTED_PYTHON": sys.executable,
        "SORTED_MASTER_ADDR": "127.0.0.1",
        "SORTED_MASTER_PORT": free_port(),
        "SORTED_MAX_RESTARTS": 0,
        "SORTED_LAUNCH": "one",
        "SORTED_MODULES": "",
        "SORTED_SHARED_FILES": "yes",
        "SORTED_ONE_MACHINE": "yes",
        "SORTED_SET_ENV_FILES": folder / "set_env.sh",
        "SORTED_HOST": f"n{rank}",
        "SORTED_TIMEOUT_SECONDS": 600,
        **variables,
    }
    (folder / "set_env.sh").write_text(
        "export ASCEND_TOOLKIT_HOME=/opt/cann-9.1.0 OF_SET_ENV=$NOT_SET\n"
    )
    script = Path(environment["SORTED_ROOT"]) / "slurm" / "node.sh"
    return subprocess.run(
        [script, mode, str(rank), "--config", "run.yaml"],
        cwd=folder,
        env=clean_environment(**environment),
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )


def problems(folder: Path, rank: int = 0, **variables: object) -> str:
    """Return the errors that a node reports."""
    done = node(folder, "check", rank, **variables)
    assert done.returncode == 1, done.stdout + done.stderr
    return "\n".join(
        line.split("\t", 3)[3]
        for line in done.stdout.splitlines()
        if line.startswith(f"error\tn{rank}\t")
    )


def judge(folder: Path, text: str, hosts: str) -> subprocess.CompletedProcess:
    (folder / "reports").write_text(text.replace(" | ", "\t"))
    return subprocess.run(
        ["awk", "-f", ROOT / "slurm" / "judge.awk", "-v", f"hosts={hosts}", folder / "reports"],
        text=True,
        capture_output=True,
        check=False,
    )


def test_a_port_that_is_in_use_and_an_interface_that_is_not_there(folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        output = problems(folder, SORTED_MASTER_PORT=port, GLOO_SOCKET_IFNAME="eth77")
        other.close()
    with (
        socket.socket() as other
    ):  # where the others would not find it, but torchrun could not have it either
        other.bind(("127.0.0.5", port))
        other.listen()
        assert f"port {port} of 127.0.0.1 is in use." in problems(folder, SORTED_MASTER_PORT=port)
    assert (
        f"port {port} of 127.0.0.1 is in use. Give another: MASTER_PORT in the site file" in output
    )
    assert "has no network interface eth77 (it has " in output and "lo" in output


def test_a_run_that_another_job_saves_into(folder, quick):
    (folder / "save").mkdir()
    lock = DirectoryLock(folder / "save")
    lock.acquire()
    try:
        assert f"--save: another run is saving into {folder}/save (" in problems(
            folder, SORTED_ROOT=quick
        )
    finally:
        lock.release()


def test_a_folder_that_cannot_be_written(folder):
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text.replace("save: save", "save: /proc"))
    assert "--save: /proc cannot be written (" in problems(folder)


def test_files_that_are_not_shared(folder):
    assert "all nodes write into one checkpoint, but the site file has SHARED_FILES=no" in problems(
        folder, SORTED_SHARED_FILES="no"
    )


@pytest.mark.long
def test_a_node_that_does_not_see_the_first_ones_files(folder):
    (folder / "save").mkdir()
    (folder / "save" / ".launch_token").write_text("another launch\n")
    assert (
        f"does not see the first node's file in {folder}/save. Use a file system that all nodes "
        "share" in problems(folder, rank=1)
    )


def test_a_first_node_that_leads_elsewhere_to_itself(folder):
    output = problems(
        folder,
        rank=1,
        SORTED_ONE_MACHINE="no",
        SORTED_MASTER_ADDR="localhost",
        SORTED_SHARED_FILES="no",
    )
    assert (
        "the first node, localhost, is '" in output
        and "seen from here. Correct /etc/hosts" in output
    )


def test_a_python_or_a_module_that_is_not_there(folder):
    output = problems(folder, SORTED_PYTHON="/no/python", SORTED_MODULES="gcc/13")
    assert (
        "/no/python cannot be run. Name the Python to use on the nodes: PYTHON in the site file."
        in output
    )
    assert "gcc/13" in output and "MODULES" in output


def write_torch(folder: Path, devices: int) -> Path:
    """Write a torch that sees this many devices and prints nothing; return its folder."""
    (folder / "path" / "torch").mkdir(parents=True, exist_ok=True)
    (folder / "path" / "torch" / "__init__.py").write_text(f"""\
class cuda:
    device_count = staticmethod(lambda: {devices})
npu, __version__ = cuda, "2.13.0"
""")
    return folder / "path"


def on_device(folder: Path) -> None:
    (folder / "run.yaml").write_text(
        (folder / "run.yaml").read_text().replace("device: cpu", "device: auto")
    )


def test_devices_that_are_missing(folder):
    on_device(folder)
    write_program(
        folder / "bin" / "nvidia-smi",
        "echo 'GPU 0: H (UUID: GPU-1)'; echo '  MIG 1g (UUID: MIG-1)'",
    )
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    assert "has 1 of the 2 devices of DEVICES_PER_NODE" in problems(
        folder, SORTED_DEVICES=2, SORTED_NODES=1, PATH=path
    )
    assert node(folder, "check", PATH=path, PYTHONPATH=write_torch(folder, 1)).returncode == 0


def test_devices_that_torch_does_not_see(folder):
    """With --device auto a torch for the CPU would train on it without a word."""
    on_device(folder)
    write_program(
        folder / "bin" / "nvidia-smi",
        "echo 'GPU 0: H (UUID: GPU-1)'; echo 'GPU 1: H (UUID: GPU-2)'",
    )
    variables = {
        "SORTED_DEVICES": 2,
        "SORTED_NODES": 1,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": write_torch(folder, 1),
    }
    assert problems(folder, **variables).startswith(
        "torch 2.13.0 sees 1 of the 2 devices of DEVICES_PER_NODE: another build, "
    )
    (folder / "path" / "torch" / "__init__.py").write_text(
        'raise ImportError("libcudart.so.13: cannot open shared object file")\n'
    )
    assert (
        "torch does not load: ImportError: libcudart.so.13: cannot open shared object file. "
        "Install torch" in problems(folder, **variables)
    )


def test_an_ascend_node_without_cann(folder):
    on_device(folder)
    path = write_torch(folder, 1)
    (path / "torch_npu").mkdir()  # as the real one does where CANN is missing
    (path / "torch_npu" / "__init__.py").write_text(
        'raise ImportError("libhccl.so: cannot open shared object file")\n'
    )
    variables = {"SORTED_KIND": "npu", "PYTHONPATH": path, "HCCL_EXEC_TIMEOUT": 900}
    output = problems(folder, **variables)
    assert "has 0 of the 1 devices" in output
    assert (
        "torch_npu does not load: ImportError: libhccl.so: cannot open shared object file. Source "
        "CANN's set_env.sh" in output
    )
    assert (
        "HCCL_EXEC_TIMEOUT is 900 s, not below the 600 s of --distributed-timeout-minutes."
        in output
    )
    assert "HCCL_EXEC_TIMEOUT is 0 s, not below the 600 s" in problems(
        folder, **{**variables, "HCCL_EXEC_TIMEOUT": 0}
    )  # for ever
    (path / "torch_npu" / "__init__.py").write_text(
        'raise RuntimeError("Two accelerators cannot be used at the same time")\n'
    )
    assert (
        "Two accelerators cannot be used at the same time. Use a CPU build of torch on Ascend "
        "hosts." in problems(folder, **variables)
    )
    output = problems(folder, **variables, SORTED_SET_ENV_FILES="/opt/nowhere/set_env.sh")
    assert (
        "/opt/nowhere/set_env.sh is not there. Install CANN, or name its set_env.sh: SET_ENV_FILES "
        "in the site file." in output
    )


def test_an_ascend_node_on_which_torch_sees_too_few(folder):
    on_device(folder)
    (write_torch(folder, 0) / "torch_npu.py").touch()
    assert "torch 2.13.0 sees 0 of the 1 devices" in problems(
        folder, SORTED_KIND="npu", PYTHONPATH=folder / "path"
    )


@pytest.mark.parametrize(
    ("minutes", "message"),
    [(2, "HCCL_CONNECT_TIMEOUT is 108 s, and HCCL accepts 120 to 7200."), (3, ""), (300, "")],
)
def test_time_outs_that_hccl_does_not_accept(folder, minutes, message):
    on_device(folder)
    (folder / "run.yaml").write_text(
        (folder / "run.yaml").read_text() + f"distributed-timeout-minutes: {minutes}\n"
    )
    (write_torch(folder, 1) / "torch_npu.py").touch()
    output = problems(folder, SORTED_KIND="npu", PYTHONPATH=folder / "path")
    assert message in output if message else "TIMEOUT" not in output
    got = environment_of(folder, SORTED_KIND="npu", SORTED_TIMEOUT_SECONDS=300 * 60)
    assert (got["HCCL_CONNECT_TIMEOUT"], got["HCCL_EXEC_TIMEOUT"]) == ("7200", "16200")


def environment_of(folder: Path, **variables: object) -> dict[str, str]:
    """Return the environment in which a node starts torchrun."""
    write_program(folder / "python", f"env -0 > {folder}/environment")
    done = node(folder, "train", SORTED_PYTHON=folder / "python", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(
        entry.split("=", 1) for entry in (folder / "environment").read_text().split("\0") if entry
    )


def test_the_environment_of_an_ascend_node(folder):
    got = environment_of(
        folder, SORTED_KIND="npu", SORTED_DEVICES=4, RANK_TABLE_FILE="/left/over", HCCL_BUFFSIZE=200
    )
    wanted = {
        "ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3",
        "ASCEND_TOOLKIT_HOME": "/opt/cann-9.1.0",
        "HCCL_CONNECT_TIMEOUT": "540",
        "HCCL_EXEC_TIMEOUT": "540",
        "HCCL_BUFFSIZE": "200",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    assert (
        wanted.items() <= got.items()
        and not {"RANK_TABLE_FILE", "TORCH_DEVICE_BACKEND_AUTOLOAD"} & got.keys()
    )
    got = environment_of(
        folder,
        SORTED_KIND="npu",
        CUDA_VISIBLE_DEVICES="2,3",
        PYTORCH_ALLOC_CONF="a:b",
        SORTED_TIMEOUT_SECONDS=3600,
    )
    assert got["ASCEND_RT_VISIBLE_DEVICES"] == "2,3" and "PYTORCH_NPU_ALLOC_CONF" not in got
    assert (
        got["HCCL_EXEC_TIMEOUT"] == "3240" and got["HCCL_EVENT_TIMEOUT"] == "3308"
    )  # the latter must be above the former


def test_the_environment_of_a_gpu_node(folder):
    got = environment_of(folder, OMP_NUM_THREADS=3)
    assert (
        got["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
        and got["OMP_NUM_THREADS"] == "3"
        and "ASCEND_RT_VISIBLE_DEVICES" not in got
    )


def test_differences_between_nodes_are_named(folder):
    output = "".join(
        f"fact | n{i} | torch | {'2.12.0' if i == 1 else '2.13.0'}\nfact | n{i} | commit | {i}\n"
        for i in range(3)
    )
    done = judge(folder, output, "n0 n1 n2")
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: torch differs between nodes: 2.13.0 on n0, n2; 2.12.0 on n1. Make it the same "
        "on all.\n"
    )
    done = judge(folder, output.replace("2.12.0", "2.13.0") + "noise\n", "n0 n1 n2")
    assert done.returncode == 0 and done.stdout == "3 nodes agree: torch 2.13.0, commit 0\n"


def test_errors_are_printed_once_with_their_hosts_and_consequences_are_not(folder):
    output = (
        "error | n0 | first | no such setting\nerror | n2 | first | no such setting\n"
        "error | n1 | after | sees no token\n"
    )
    done = judge(folder, output, "n0 n1 n2 n3")
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: n0, n2: no such setting\nerror: n3: gave no answer. See its output above.\n"
    )
    assert (
        judge(folder, "error | n1 | after | sees no token\n", "n1").stderr
        == "error: n1: sees no token\n"
    )


def test_machines_must_differ(folder):
    output = "fact | n0 | machine | a\nfact | n1 | machine | b\n"
    assert judge(folder, output, "n0 n1").returncode == 0
    done = judge(folder, output + "fact | n2 | machine | a\n", "n0 n1 n2")
    assert (
        done.stderr
        == "error: n0, n2: are several names of one machine. Leave all but one out, or set "
        "ONE_MACHINE=yes.\n"
    )
