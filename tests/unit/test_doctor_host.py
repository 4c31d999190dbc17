"""What the doctor says of Python, packages, limits, interfaces, disks and settings, from hand-made facts of every failure."""

import dataclasses
from pathlib import Path

import pytest

from megatron_sorted.doctor import disks, interfaces, limits, local, packages, probes, run_file
from megatron_sorted.doctor.finding import FAIL, OK, WARN, worst
from megatron_sorted.doctor.interfaces import Interface
from megatron_sorted.doctor.limits import Container
from megatron_sorted.doctor.probes import Probe, probe
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.processes import World, read_world, read_world_of_training
from megatron_sorted.settings.load import load_settings

GIB = 2**30
TORCH = {"version": "2.13.0", "file": "/x/torch/__init__.py", "distributed": True, "gloo": True}


def only(findings):
    assert len(findings) == 1, findings
    return findings[0]


@pytest.mark.parametrize(("version", "active", "verdict"), [
    ((3, 11, 7), None, OK), ((3, 9, 2), None, FAIL), ((3, 11, 7), "/env", OK), ((3, 11, 7), "/other", WARN),
])  # fmt: skip
def test_python(version, active, verdict):
    environment = {} if active is None else {"VIRTUAL_ENV": active}
    assert (
        only(packages.check_python(version, "/env/bin/python", "/env", environment)).verdict
        == verdict
    )


def test_python_path(tmp_path):
    def check(entries):
        return packages.check_python_path({"PYTHONPATH": entries}, (3, 11, 7))

    assert only(check(f"{tmp_path}")).verdict == OK and not check("")
    assert only(check(f"{tmp_path}:{tmp_path}/gone")).verdict == WARN
    assert "another Python" in only(check("/usr/lib/python3.9/site-packages")).value


def write_core(folder: Path, text: str) -> str:
    (folder / "megatron" / "core").mkdir(parents=True)
    (folder / "megatron" / "core" / "__init__.py").write_text("")
    (folder / "megatron" / "core" / "package_info.py").write_text(text)
    return str(folder)


def test_copies_on_the_path_and_editable_ones(tmp_path):
    first = write_core(
        tmp_path / "one", "MAJOR = 0\nMINOR = 12\nPATCH = 1\n__version__ = '.'.join(map(str, x))\n"
    )
    second = write_core(tmp_path / "two", "__version__ = '0.16.1'\n")
    checkout = write_core(tmp_path / "checkout" / "src", "")
    info = tmp_path / "two" / "megatron_core-0.15.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.0\n")
    (info / "direct_url.json").write_text(
        f'{{"dir_info": {{"editable": true}}, "url": "file://{tmp_path}/checkout"}}'
    )
    (tmp_path / "link").symlink_to(tmp_path / "one")
    found = packages.copies_of(
        "megatron/core",
        "megatron-core",
        [first, second, str(tmp_path / "link"), str(tmp_path / "nothing")],
    )
    assert [(copy.folder, copy.version, copy.editable) for copy in found] == [
        (first, "0.12.1", False),
        (second, "0.16.1", False),
        (checkout, "0.15.0", True),
    ]


@pytest.mark.parametrize(("versions", "verdict", "words"), [
    ([], FAIL, "not found"), (["0.16.1"], OK, "0.16.1 in /a0"), (["0.15.3"], OK, "0.15.3"), (["0.12.1"], WARN, "0.12.1"),
    (["0.12.0"], FAIL, "0.12.0"), (["0.17.0"], FAIL, "0.17.0"), (["unknown"], FAIL, "unknown"),
    (["0.16.1", "0.11.0"], WARN, "2 copies; taken: 0.16.1 in /a0; also: 0.11.0 in /a1"), (["0.11.0", "0.16.1"], FAIL, "taken: 0.11.0"),
])  # fmt: skip
def test_copies_are_judged_by_the_one_that_is_taken(versions, verdict, words):
    copies = [
        packages.InstalledCopy(f"/a{number}", version) for number, version in enumerate(versions)
    ]
    found = only(packages.check_megatron_copies(copies))
    assert (
        found.verdict == verdict and words in found.value and bool(found.remedy) == (verdict != OK)
    )


def test_required_packages():
    whole = {name.lower(): "9.0" for name in packages.REQUIRED}
    assert only(packages.check_required(whole)).verdict == OK
    found = packages.check_required(
        {
            **{name: version for name, version in whole.items() if name != "psutil"},
            "pydantic": "1.10",
        }
    )
    assert [(finding.name, finding.verdict) for finding in found] == [
        ("pydantic", FAIL),
        ("psutil", FAIL),
    ]
    assert "hangs" in found[1].value


@pytest.mark.parametrize(
    ("probes", "verdict", "words"),
    [
        ({"torch": Probe(TORCH)}, OK, "2.13.0 in /x/torch"),
        ({"torch": Probe({**TORCH, "version": "2.3.0"})}, FAIL, "2.3.0"),
        ({"torch": Probe({**TORCH, "gloo": False})}, FAIL, "without gloo"),
        (
            {"torch": Probe(errors=("ModuleNotFoundError: No module named 'torch'",))},
            FAIL,
            "not installed",
        ),
        ({"torch": Probe(errors=("crashed with SIGSEGV",))}, FAIL, "SIGSEGV"),
        (
            {
                "torch": Probe(errors=("RuntimeError: a", "ImportError: b")),
                "torch alone": Probe(TORCH),
            },
            FAIL,
            "ImportError: b",
        ),
    ],
)
def test_torch(probes, verdict, words):
    found = only(local.check_torch(probes))
    assert found.verdict == verdict and words in found.value


def test_imports_that_crash_hang_or_end_are_told_apart(tmp_path):
    for name, text in (
        ("apex", "import os; os.abort()"),
        ("torch", "import time; time.sleep(60)"),
        ("transformer_engine", "print('hello'); raise SystemExit(3)"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    assert "SIGABRT" in probe(["apex"], environment, 60)[0].error
    first, second = probe(["torch", "megatron"], environment, 2)
    assert "did not end within 2 s" in first.error and second.facts is None
    assert probe(["transformer_engine"], environment, 60)[0].error == "SystemExit: 3"


@pytest.mark.parametrize(("root", "is_checkout", "path"), [
    ("/clone", True, ["/clone", "/first", "/x/site-packages"]), ("/first", True, ["/first", "/x/site-packages"]),
    ("/x/site-packages", False, ["/first", "/x/site-packages"])])  # fmt: skip
def test_what_is_examined_stands_where_training_finds_it(monkeypatch, root, is_checkout, path):
    monkeypatch.setattr("sys.path", ["/folder/of/the/program", "/first", "/x/site-packages"])
    monkeypatch.setattr(probes, "ROOT", Path(root))
    monkeypatch.setattr(probes, "IS_CHECKOUT", is_checkout)
    assert probes.training_path() == path


@pytest.mark.parametrize(
    ("values", "names"),
    [((65536, -1), []), ((1024, -1), ["ulimit -n (files)"]), ((-1, 65536), ["ulimit -l (locked)"])],
)
def test_limits(values, names):
    assert [
        finding.name
        for finding in limits.check_limits(*values, has_device=True)
        if finding.verdict != OK
    ] == names


def test_limits_that_matter_to_devices_only():
    assert worst(limits.check_limits(65536, 65536, has_device=False)) == OK
    assert worst(limits.check_limits(128, -1, has_device=False)) == FAIL


@pytest.mark.parametrize(("total", "free", "has_device", "verdict"), [
    (None, 0, False, FAIL), (64 * 2**20, 64 * 2**20, True, FAIL), (64 * 2**20, 64 * 2**20, False, WARN), (8 * GIB, GIB // 2, True, WARN),
    (8 * GIB, 8 * GIB, True, OK),
])  # fmt: skip
def test_shared_memory(total, free, has_device, verdict):
    assert only(limits.check_shared_memory(total, free, has_device)).verdict == verdict


def test_limits_of_containers_of_both_versions(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    for folder in (two, one / "cpu", one / "memory", one / "pids"):
        folder.mkdir(parents=True)
    for name, text in (
        ("cpu.max", "150000 100000"),
        ("memory.max", "8589934592"),
        ("memory.current", "1024"),
        ("pids.max", "max"),
    ):
        (two / name).write_text(text + "\n")
    for name, text in (
        ("cpu/cpu.cfs_quota_us", "-1"),
        ("cpu/cpu.cfs_period_us", "100000"),
        ("pids/pids.max", "512"),
        ("memory/memory.limit_in_bytes", "9223372036854771712"),
        ("memory/memory.usage_in_bytes", "5"),
    ):
        (one / name).write_text(text + "\n")
    assert limits.read_container(two) == Container(8 * GIB, 1024, 1.5, None)
    assert limits.read_container(one) == Container(None, 5, None, 512)
    assert limits.read_container(tmp_path / "none") == Container()


def test_memory_of_a_container():
    assert only(limits.check_memory(64 * GIB, 32 * GIB, Container())).verdict == OK
    assert only(limits.check_memory(64 * GIB, GIB // 2, Container())).verdict == WARN
    assert (
        only(
            limits.check_memory(
                64 * GIB, 32 * GIB, Container(memory_bytes=2 * GIB, memory_used_bytes=3 * GIB // 2)
            )
        ).verdict
        == WARN
    )


@pytest.mark.parametrize(
    ("usable", "container", "threads", "processes", "wrong"),
    [
        (64, Container(), "8", 8, []), (64, Container(), None, 8, ["OMP_NUM_THREADS"]), (64, Container(), "16", 8, ["OMP_NUM_THREADS"]),
        (1, Container(), "1", 8, ["CPU cores"]), (64, Container(cpus=4), "1", 8, []), (64, Container(cpus=4), "2", 4, ["OMP_NUM_THREADS"]),
        (64, Container(processes=256), "1", 8, ["processes"]), (64, Container(), "many", 1, ["OMP_NUM_THREADS"]),
    ],
)  # fmt: skip
def test_processors(usable, container, threads, processes, wrong):
    environment = {} if threads is None else {"OMP_NUM_THREADS": threads}
    found = limits.check_processors(container, environment, processes, 64, usable)
    assert [finding.name for finding in found if finding.verdict != OK] == wrong


LOOPBACK, FAST, SLOW, DOWN = (
    Interface("lo", "127.0.0.1", True, None),
    Interface("eth0", "10.0.0.1", True, 200000),
    Interface("eth1", "10.1.0.1", True, 1000),
    Interface("ib0", "", False, None),
)
GLOO, NCCL, HCCL = (f"{library}_SOCKET_IFNAME" for library in ("GLOO", "NCCL", "HCCL"))


@pytest.mark.parametrize(
    ("present", "named", "num_nodes", "verdict", "words"),
    [
        ([LOOPBACK, FAST], {}, 2, OK, "eth0 10.0.0.1 200 Gb/s"), ([LOOPBACK], {}, 1, OK, "none but"),
        ([LOOPBACK, DOWN], {}, 2, FAIL, "none but"), ([LOOPBACK, FAST, SLOW], {}, 2, WARN, "eth1"),
        ([LOOPBACK, FAST, SLOW], {GLOO: "eth0"}, 2, OK, "eth0: 10.0.0.1"), ([FAST], {GLOO: "eth9"}, 2, FAIL, "eth9 does not exist"),
        ([FAST], {GLOO: "eth"}, 2, FAIL, "eth does not"), ([FAST], {NCCL: "eth"}, 2, OK, "eth: 10.0.0.1"),
        ([FAST], {NCCL: "=eth"}, 2, FAIL, "eth does not"), ([FAST], {NCCL: "^docker,lo"}, 2, OK, "^docker"),
        ([FAST, DOWN], {HCCL: "ib0"}, 2, FAIL, "ib0 is down"), ([LOOPBACK, FAST], {GLOO: "lo"}, 2, FAIL, "loop-back"),
        ([LOOPBACK, FAST], {GLOO: "lo"}, 1, OK, "lo"),
    ],
)  # fmt: skip
def test_interfaces(present, named, num_nodes, verdict, words):
    found = interfaces.check_interfaces(present, named, num_nodes)
    assert worst(found) == verdict and any(words in finding.value for finding in found)


def test_host_name_and_master():
    def host(*addresses, nodes=2, named=()):
        return only(interfaces.check_host_name("n1", addresses, nodes, dict(named))).verdict

    assert (
        host("10.0.0.1"),
        host("127.0.1.1"),
        host(),
        host("127.0.1.1", nodes=1),
        host(nodes=1),
    ) == (OK, FAIL, FAIL, OK, WARN)
    assert host("127.0.1.1", named={GLOO: "eth0"}.items()) == OK

    def master(address, *addresses, nodes=2):
        return worst(interfaces.check_master(address, addresses, nodes))

    assert (
        master(None),
        master("n0", "10.0.0.1"),
        master("n0"),
        master("localhost", "127.0.0.1"),
    ) == (OK, OK, FAIL, FAIL)
    assert master("localhost", "::1", "127.0.0.1", nodes=1) == OK


def test_this_host_has_a_loopback():
    assert any(one.address == "127.0.0.1" and one.up for one in interfaces.read_interfaces())
    assert "127.0.0.1" in interfaces.addresses_of("localhost") and not interfaces.addresses_of(
        "no.such.host.invalid"
    )


MOUNTS = """\
22 1 259:1 / / rw - ext4 /dev/a rw
30 22 0:40 / /shared rw,relatime shared:5 - nfs4 server:/x rw
31 30 0:41 / /shared/my\\040run rw - lustre a@tcp:/y rw
32 22 0:42 / /shar rw - tmpfs t rw
"""


@pytest.mark.parametrize(("folder", "kind"), [
    ("/home/a", "ext4"), ("/shared", "nfs4"), ("/shared/b", "nfs4"), ("/shared/my run/c", "lustre"), ("/shar/x", "tmpfs"),
])  # fmt: skip
def test_file_systems(folder, kind):
    assert disks.file_system_of(Path(folder), MOUNTS) == kind


GOOD = {"seconds": 0.1, "same": True, "locks": True, "free": 100 * GIB, "files": 10**6}


@pytest.mark.parametrize(
    ("kind", "changed", "num_nodes", "verdict", "words"),
    [
        ("ext4", {}, 1, OK, "640 MiB/s"), ("nfs4", {}, 2, OK, "nfs4"), ("ext4", {}, 2, WARN, "usually not shared"),
        ("tmpfs", {}, 1, WARN, "tmpfs"), ("nfs4", {"seconds": 10}, 1, WARN, "6 MiB/s"),
        ("nfs4", {"free": GIB // 2}, 1, FAIL, "512 MiB free"),
        ("nfs4", {"files": 3}, 1, FAIL, "3 files left"), ("nfs4", {"files": None}, 1, OK, "nfs4"),
        ("nfs4", {"same": False}, 1, FAIL, "something else"), ("nfs4", {"locks": False, "lock_error": "No locks"}, 1, WARN, "No locks"),
        ("nfs4", {"error": "Read-only file system"}, 1, FAIL, "Read-only"),
    ],
)  # fmt: skip
def test_disks(kind, changed, num_nodes, verdict, words):
    found = disks.check_disk(Path("/run"), kind, {**GOOD, **changed}, num_nodes)
    assert worst(found) == verdict and any(words in finding.value for finding in found)


def test_a_real_folder_is_tried_and_left_as_it_was(tmp_path):
    facts = disks.try_disk(tmp_path, 60, mebibytes=2)
    assert (
        facts["same"]
        and facts["free"] > 0
        and facts["seconds"] > 0
        and not list(tmp_path.iterdir())
    )
    assert "error" in disks.try_disk(tmp_path / "missing", 60)
    assert "did not end" in disks.try_disk(tmp_path, 0.001)["error"]
    assert disks.existing_folder(tmp_path / "a" / "b") == tmp_path


@pytest.mark.parametrize(("free", "kept", "verdict"), [
    (10, None, FAIL), (150, None, WARN), (500, None, WARN), (5000, None, OK), (350, 3, WARN), (450, 3, OK),
])  # fmt: skip
def test_room_for_checkpoints(free, kept, verdict):
    assert only(disks.check_space(Path("/run"), free, 100, kept)).verdict == verdict


RUN = """\
num-layers: 4
hidden-size: 64
num-attention-heads: 4
vocab-size: 100
mock-data: true
tensor-model-parallel-size: 2
"""


def settings_of(tmp_path, text=RUN):
    (tmp_path / "run.yaml").write_text(text)
    return load_settings(["--config", str(tmp_path / "run.yaml")])


SITE = run_file.Site("cpu", 0, True, 4, 4)
GPU_SITE = dataclasses.replace(SITE, device="cuda", num_devices=8)


@pytest.mark.parametrize(
    ("changed", "site", "verdict", "words"),
    [
        ({}, SITE, OK, "on 4 processes"),
        ({}, dataclasses.replace(SITE, world_size=3), FAIL, "3 is not a multiple of 2"),
        ({"bf16": True}, dataclasses.replace(GPU_SITE, has_bf16=False), FAIL, "--bf16"),
        ({"fp16": True}, SITE, WARN, "--fp16"),
        ({}, dataclasses.replace(GPU_SITE, num_devices=0), FAIL, "has none"),
        (
            {},
            dataclasses.replace(GPU_SITE, num_devices=2),
            FAIL,
            "4 processes on this host, 2 devices",
        ),
        ({}, dataclasses.replace(GPU_SITE, local_processes=None), OK, "8 x cuda"),
        (
            {"mock_data": False, "data_path": ("none",), "tokenizer_model": "none.model"},
            SITE,
            FAIL,
            "none.bin",
        ),
        ({"load": "nowhere"}, SITE, FAIL, "nowhere is not a folder"),
        ({"hang_timeout_minutes": 100.0}, SITE, WARN, "100"),
    ],
)
def test_runs(tmp_path, changed, site, verdict, words):
    settings = dataclasses.replace(settings_of(tmp_path), **changed)
    found = run_file.check_run(settings, site)
    assert worst(found) == verdict and any(words in finding.value for finding in found), found


def test_data_files_are_opened(tmp_path):
    settings = dataclasses.replace(
        settings_of(tmp_path),
        mock_data=False,
        data_path=(str(tmp_path / "text"),),
        tokenizer_model=str(tmp_path / "tokenizer.model"),
    )
    for name, text in (("text.bin", "x"), ("text.idx", ""), ("tokenizer.model", "x")):
        (tmp_path / name).write_text(text)
    bad = [finding for finding in run_file.check_run(settings, SITE) if finding.verdict != OK]
    assert only(bad).value == f"{tmp_path / 'text.idx'} is empty"
    (tmp_path / "text.idx").write_text("x")
    assert worst(run_file.check_run(settings, SITE)) == OK


def test_a_run_file_that_cannot_be_read_is_a_finding(tmp_path):
    (tmp_path / "run.yaml").write_text("num-layer: 4\n")
    settings, found = run_file.load_run(tmp_path / "run.yaml")
    assert (
        settings is None and "num-layer" in only(found).value and "num-layers" in only(found).remedy
    )


def test_the_size_of_a_checkpoint(tmp_path):
    network = "untie-embeddings-and-output-weights: true\nnormalization: RMSNorm\nswiglu: true\ndisable-bias-linear: true\n"
    settings = settings_of(tmp_path, RUN + network)
    # embedding and head; of each layer q, k, v, projection, three matrices of 64 x 192 and two norms; the last norm
    parameters = 2 * 100 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 64
    assert run_file.checkpoint_bytes(settings) == 12 * parameters  # fp32 weights and two moments
    assert run_file.checkpoint_bytes(dataclasses.replace(settings, bf16=True)) == 14 * parameters
    assert run_file.checkpoint_bytes(dataclasses.replace(settings, vocab_size=None)) is None


def test_processes_a_run_is_checked_for(tmp_path):
    settings = settings_of(tmp_path)
    wanted = run_file.wanted_processes
    assert settings.world_size is None and [
        wanted(settings, None, None, devices) for devices in (8, 0, 3)
    ] == [8, 2, 2]
    settings = dataclasses.replace(settings, world_size=128)
    assert (
        wanted(settings, 16, 4, 8),
        wanted(settings, None, 4, 8),
        wanted(settings, None, None, 8),
    ) == (16, 4, 128)


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(("environment", "world", "num_nodes"), [
    ({}, World(), 1), ({"SLURM_PROCID": "0"}, World(), 1), (TORCHRUN, World(5, 8, 1, 4, 1), 2), (SRUN, World(9, 16, 1, 8, 1), 2),
])  # fmt: skip
def test_worlds(environment, world, num_nodes):
    assert read_world(environment) == world and world.num_nodes == num_nodes


@pytest.mark.parametrize(("environment", "words"), [
    ({**TORCHRUN, "RANK": "five"}, "RANK is 'five', which is not a whole number"), ({**TORCHRUN, "RANK": "8"}, "RANK: 8 is not below"),
    ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"), ({**SRUN, "SLURM_NODEID": ""}, "SLURM_NODEID is ''"),
])  # fmt: skip
def test_a_world_that_cannot_be(environment, words):
    with pytest.raises(PlatformError, match=words):
        read_world(environment)


@pytest.mark.parametrize(("environment", "launcher"), [
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "srun"),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "srun"), ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpiexec"),
])  # fmt: skip
def test_tasks_that_would_each_be_a_run_of_their_own_are_refused(environment, launcher):
    with pytest.raises(
        PlatformError,
        match=f"{launcher} started 2 tasks .* torchrun, on several hosts with slurm/gpu.sbatch",
    ):
        read_world_of_training(environment)
    # torchrun below it is what is asked for
    assert read_world_of_training({**environment, **TORCHRUN}) == World(5, 8, 1, 4, 1)


@pytest.mark.parametrize("environment", [
    {}, {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the shell of a batch job
])  # fmt: skip
def test_one_task_is_one_process(environment):
    assert read_world_of_training(environment) == World()


def test_a_size_without_a_rank_is_refused():
    with pytest.raises(PlatformError, match="WORLD_SIZE is 4 and RANK is unset"):
        read_world_of_training({"WORLD_SIZE": "4"})
