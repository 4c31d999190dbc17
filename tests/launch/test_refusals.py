"""Errors of the launchers before anything is submitted, and the commands they print: no cluster."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, RUN, write_site
from tests.support.clean_environment import clean_environment


def run(folder: Path, launcher: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / "slurm" / launcher, *map(str, arguments)],
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
        env=clean_environment(),
    )


def refusal(folder: Path, launcher: str, *arguments: object) -> str:
    """Return the one line of error of a launcher."""
    done = run(folder, launcher, *arguments)
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "NCCL_SOKET_IFNAME=eth0",
            "site, line 2: there is no NCCL_SOKET_IFNAME in a site file. Did you mean "
            ".*NCCL_SOCKET_IFNAME",
        ),
        (
            "FRUIT=apple",
            "there is no FRUIT in a site file. Use ACCOUNT CONTAINER_COMMAND .*, or a variable of "
            "docs/clusters.md",
        ),
        (
            "export NCCL_DEBUG=INFO",
            "'export NCCL_DEBUG=INFO' is not NAME=value. Write one assignment on each line, "
            "without export",
        ),
        ("DEVICES_PER_NODE=8", "DEVICES_PER_NODE is given twice. Leave one out"),
        ("MAX_RESTARTS=often", "MAX_RESTARTS is 'often', which is not a whole number. Change it"),
        ("MASTER_PORT=80", "MASTER_PORT is '80', which is not a port above 1023"),
        ("MASTER_PORT=70000", "MASTER_PORT is '70000', which is not a port"),
        ("SHARED_FILES=maybe", "SHARED_FILES is 'maybe', which is not one of yes, no"),
        ("PYTHON=python3", "PYTHON is 'python3', which is not an absolute path"),
        ("TIME_LIMIT=tomorrow", "TIME_LIMIT is 'tomorrow', which is not a time of SLURM"),
        ("HCCL_EXEC_TIMEOUT=1h", "HCCL_EXEC_TIMEOUT is '1h', which is not a whole number"),
        (
            "SBATCH_OPTIONS=--qos normal",
            "the value of SBATCH_OPTIONS is not one word. Put it in double quotes",
        ),
        (
            'CONTAINER_MOUNTS="$HOME:/data"',
            r"\$, ` and .* are not expanded in a site file. Write the value out",
        ),
        ('MODULES="$(touch run)"', "are not expanded in a site file"),
        ("NCCL_DEBUG=", "NCCL_DEBUG is '', which is not a value."),
    ],
)
def test_a_wrong_line_of_a_site_file(folder, line, reason):
    (folder / "site").write_text(f"DEVICES_PER_NODE=2\n{line}\n")
    message = refusal(folder, "gpu.sbatch", "--print", "--site", "site", "run.yaml")
    assert re.search(reason, message), message
    assert not (folder / "run").exists()


def test_a_site_file_and_a_run_as_an_editor_under_windows_leaves_them(folder):
    (folder / "site").write_bytes(
        b'# ours\r\nDEVICES_PER_NODE=2  \r\nPARTITION="a"\r\n\r\nMAX_RESTARTS=1 # once\r\n'
    )
    (folder / "run.yaml").write_bytes(RUN.replace("\n", "\r\n").encode())
    done = run(folder, "gpu.sbatch", "--print", "--site", "site", "run.yaml")
    assert (
        done.returncode == 0
        and "--partition=a " in done.stdout
        and "--max-restarts=1 " in done.stdout
    ), done.stderr


def test_an_ssh_that_refuses_its_options(folder):
    write_site(folder, ONE_MACHINE="no", REMOTE_SHELL="ssh", SSH_OPTIONS="-o Fruit=apple")
    done = run(
        folder,
        "launch_hosts.sh",
        "gpu",
        "--print",
        "--hosts",
        "n0,n1",
        "--site",
        "site",
        "run.yaml",
    )
    assert done.returncode == 2
    assert done.stderr.endswith(
        "error: ssh does not accept its options (above). Correct SSH_OPTIONS in the site file.\n"
    ), done.stderr


@pytest.mark.parametrize(
    ("limit", "seconds", "left"),
    [
        ("5", 300, 0),
        ("5:01", 300, 1),
        ("0:05:00", 300, 0),
        ("0-0", 1, None),
        ("0-1", 3600, 0),
        ("1-00:01", 86460, 0),
        ("08:09:09", 29348, 1),
        ("1-00:00:09", 86409, 0),
        ("0", 300, None),
    ],
)
def test_a_time_limit_that_leaves_no_time_to_train(folder, limit, seconds, left):
    write_site(folder, TIME_LIMIT=limit, SAVE_SECONDS=seconds)
    if left == 0:
        message = refusal(folder, "gpu.sbatch", "--print", "--site", "site", "run.yaml")
        assert (
            f"TIME_LIMIT={limit} is {seconds} s, of which SAVE_SECONDS ({seconds}) leaves none to "
            "train." in message
        )
    else:
        done = run(folder, "gpu.sbatch", "--print", "--site", "site", "run.yaml")
        assert done.returncode == 0 and f"--time={limit} " in done.stdout, done.stderr


def test_contradictions_in_a_site_file(folder):
    write_site(folder, PYTORCH_ALLOC_CONF="a:b", PYTORCH_NPU_ALLOC_CONF="a:b")
    assert "which torch refuses. Leave one out." in refusal(
        folder, "npu.sbatch", "--print", "--site", "site", "run.yaml"
    )
    write_site(folder, CONTAINER_IMAGE="a.sqsh", CONTAINER_COMMAND="apptainer exec b.sif")
    assert "both given. Leave one out." in refusal(
        folder, "gpu.sbatch", "--print", "--site", "site", "run.yaml"
    )
    (folder / "site").write_text("MAX_RESTARTS=1\n")
    assert "DEVICES_PER_NODE is missing" in refusal(
        folder, "gpu.sbatch", "--print", "--site", "site", "run.yaml"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("run.yaml",), "no site file. Copy one of examples/sites"),
        (("--site", "nowhere", "run.yaml"), "--site nowhere: cannot be read"),
        (("--site", ".", "run.yaml"), "--site .: cannot be read as a file"),
        (
            ("--site", "site", "run.yaml", "--world-size", "16"),
            "--world-size: launchers read the key world-size of the run file. Change it there",
        ),
        (("--site", "site"), "no run file. Usage: gpu.sbatch"),
        (("--site", "site", "nothing.yaml"), "nothing.yaml: there is no such run file"),
        (("--site", "site", "."), ".: there is no such run file"),
        (
            ("--site", "site", "--node", "2", "run.yaml"),
            "--node: options before the run file are --print --site --nodes.",
        ),
        (
            ("--site", "site", "run.yaml", "--nodes", "3"),
            "--nodes: stands after the run file, where settings of the run are. Put it",
        ),
        (("--site", "site", "run.yaml", "--print"), "--print: stands after the run file"),
        (
            ("--site", "site", "--nodes", "3", "run.yaml"),
            "3 nodes (--nodes) x 1 devices are 3 processes, but ",
        ),
        (
            ("--site", "site", "--nodes", "two", "run.yaml"),
            "--nodes: 'two' is not a number of nodes",
        ),
        (
            ("--site", "site", "run.yaml", "--context-parallel-size", 4),
            "number of processes: 2 is not a multiple of 4",
        ),
        (("--site", "site", "run.yaml", "--num-layres", 4), "--num-layres: there is no such"),
    ],
)
def test_a_wrong_command_line(folder, arguments, reason):
    assert reason in refusal(folder, "gpu.sbatch", "--print", *arguments)


def test_a_world_that_does_not_divide_into_nodes_and_a_run_without_one(folder):
    write_site(folder, DEVICES_PER_NODE=8)
    assert "world-size 2 is not a multiple of the 8 devices" in refusal(
        folder, "gpu.sbatch", "--print", "--site", "site", "run.yaml"
    )
    (folder / "run.yaml").write_text(RUN.replace("world-size: 2\n", ""))
    assert "no key 'world-size: N'" in refusal(
        folder, "gpu.sbatch", "--print", "--site", "site", "run.yaml"
    )


@pytest.mark.skipif(not shutil.which("ssh"), reason="ssh missing: apt-get install openssh-client")
@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        (
            "localhost,n1",
            "MASTER_ADDR 'localhost' (the first of --hosts) is empty or this host itself, and 2 "
            "nodes cannot connect there",
        ),
        ("127.0.0.1,n1", "MASTER_ADDR '127.0.0.1'"),
        ("n0,n0", "n0 is named twice"),
        ("n0,n1,n2", "3 nodes (--hosts) x 1 devices are 3 processes"),
        ("n0,n1;reboot", "'n1;reboot' is not the name of a host"),
        ("n0,-oProxyCommand", "'-oProxyCommand' is not the name of a host"),
        (
            "hosts.txt",
            "1 nodes (--hosts; there is no file hosts.txt, so it names a host) x 1 devices are 1 "
            "processes",
        ),
        (
            "./hosts.txt",
            "--hosts ./hosts.txt: there is no file ./hosts.txt, and './hosts.txt' is not the name "
            "of a host",
        ),
        ("empty", "--hosts empty: names no host"),
    ],
)
def test_wrong_hosts(folder, hosts, reason):
    write_site(folder, ONE_MACHINE="no", REMOTE_SHELL="ssh")
    (folder / "empty").write_text("# no host\n")
    assert reason in refusal(
        folder, "launch_hosts.sh", "gpu", "--print", "--hosts", hosts, "--site", "site", "run.yaml"
    )


@pytest.mark.parametrize(("devices", "nodes"), [(8, 16), (16, 8)])
@pytest.mark.parametrize("kind", ["gpu", "npu"])
def test_the_printed_commands_for_128_devices(folder, kind, devices, nodes):
    (folder / "run.yaml").write_text(
        RUN.replace("world-size: 2", "world-size: 128").replace("batch-size: 4", "batch-size: 256")
    )
    (folder / "site").write_text(
        f"DEVICES_PER_NODE={devices}\nPARTITION=train\nTIME_LIMIT=1-00:00:00\nGLOO_SOCKET_IFNAME=eth0\n"
        f'CONTAINER_IMAGE=/images/t.sqsh\nPYTHON=/usr/bin/python3\nSBATCH_OPTIONS="--qos=high '
        f'--exclude=bad"\n'
    )
    done = run(folder, f"{kind}.sbatch", "--print", "--site", "site", "run.yaml", "--lr", "1e-3")
    assert done.returncode == 0, done.stderr
    _, sbatch, _, srun, _, torchrun, *rest = done.stdout.splitlines()
    request = f"--gpus-per-node={devices}" if kind == "gpu" else f"--gres=npu:{devices}"
    arguments = {
        "sbatch",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        request,
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        "--partition=train",
        "--time=1-00:00:00",
        "--qos=high",
        "--exclude=bad",
    }
    assert arguments <= set(sbatch.split())
    assert {
        "srun",
        f"--ntasks={nodes}",
        "--kill-on-bad-exit=1",
        "--container-image=/images/t.sqsh",
    } <= set(srun.split())
    mounts = f"--container-mounts={ROOT}:{ROOT},{folder}:{folder}".replace(",", "\\,")
    assert mounts in srun.split() and "GLOO_SOCKET_IFNAME" in srun
    assert torchrun.split() == [
        "/usr/bin/python3",
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={devices}",
        "--node-rank=NODE_RANK",
        "--rdzv-backend=static",
        "--master-addr=FIRST_NODE",
        "--master-port=PORT",
        "--max-restarts=0",
        f"{ROOT}/pretrain_sorted.py",
        "--config",
        f"{folder}/run.yaml",
        "--lr",
        "1e-3",
    ]
    assert "GLOO_SOCKET_IFNAME=eth0" in rest and f"SORTED_KIND={kind}" in rest


@pytest.mark.skipif(not shutil.which("ssh"), reason="ssh missing: apt-get install openssh-client")
def test_the_printed_commands_for_hosts(folder):
    write_site(
        folder,
        REMOTE_SHELL="ssh",
        ONE_MACHINE="no",
        SSH_OPTIONS="-p 2222",
        CONTAINER_COMMAND="apptainer exec t.sif",
    )
    done = run(
        folder,
        "launch_hosts.sh",
        "npu",
        "--print",
        "--hosts",
        "n8,n9",
        "--site",
        "site",
        "run.yaml",
        "--lr",
        "1e-3",
    )
    assert done.returncode == 0, done.stderr
    for line, host in zip(done.stdout.splitlines()[1:3], ["n8", "n9"], strict=True):
        *ssh, command = shlex.split(line)
        assert ssh[0] == "ssh" and "BatchMode=yes" in ssh and ssh[-3:] == ["-p", "2222", host]
        bash, option, script = shlex.split(command)
        arguments = shlex.split(script)
        assert [bash, option, *arguments[:8]] == [
            "bash",
            "-c",
            "cd",
            str(folder),
            "||",
            "exit",
            "91;",
            "exec",
            "apptainer",
            "exec",
        ]
        assert {
            f"SORTED_HOST={host}",
            "SORTED_HOSTS=n8 n9",
            "SORTED_MASTER_ADDR=n8",
            "SORTED_KIND=npu",
        } < set(arguments)
        assert arguments[-7:] == [
            f"{ROOT}/slurm/node.sh",
            "attend",
            "listed",
            "--config",
            f"{folder}/run.yaml",
            "--lr",
            "1e-3",
        ]


def test_every_site_example_is_accepted(folder):
    examples = sorted((ROOT / "examples" / "sites").iterdir())
    assert len(examples) >= 3
    for path in examples:
        devices = int(re.search(r"^DEVICES_PER_NODE=(\d+)$", path.read_text(), re.MULTILINE)[1])
        (folder / "run.yaml").write_text(
            RUN.replace("world-size: 2", f"world-size: {devices}").replace(
                "size: 4", f"size: {2 * devices}"
            )
        )
        done = run(folder, "gpu.sbatch", "--print", "--site", path, "run.yaml")
        assert done.returncode == 0, f"{path}: {done.stderr}"


@pytest.mark.skipif(
    not shutil.which("shellcheck"), reason="shellcheck missing: apt-get install shellcheck"
)
def test_shellcheck():
    scripts = [
        *ROOT.glob("slurm/*.sh"),
        *ROOT.glob("slurm/*.sbatch"),
        ROOT / ".ci" / "run",
        ROOT / ".ci" / "install",
    ]
    assert len(scripts) >= 8
    done = subprocess.run(
        ["shellcheck", "-x", *scripts], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("launcher", ["gpu.sbatch", "npu.sbatch", "launch_hosts.sh"])
def test_help(folder, launcher):
    done = run(folder, launcher, "--help")
    assert (
        done.returncode == 0
        and done.stderr == ""
        and f"slurm/{launcher} [--print]" in done.stdout
        and "RUN.yaml" in done.stdout
    )


def test_print_before_the_kind_of_hosts_is_print_after_it(folder):
    arguments = ("--hosts", "a,b", "--site", "site", "run.yaml")
    before, after = (
        run(folder, "launch_hosts.sh", "--print", "gpu", *arguments),
        run(folder, "launch_hosts.sh", "gpu", "--print", *arguments),
    )
    assert (before.returncode, before.stderr) == (after.returncode, after.stderr)

    def settled(text: str) -> str:
        return re.sub(r"SORTED_LAUNCH=\S+|[\w.-]+\.\d+\.\d{9,}", "", text)

    assert settled(before.stdout) == settled(after.stdout)
