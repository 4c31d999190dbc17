"""The doctor's checks of Python, packages, limits, interfaces, disks and runs, on made-up facts."""

import dataclasses
from pathlib import Path

import pytest

from megatron_sorted.doctor import addresses, disks, limits, local, packages, probes, run_file
from megatron_sorted.doctor.finding import FAIL, OK, WARN, worst
from megatron_sorted.doctor.probes import Probe, probe
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.processes import World, read_world, read_world_of_training
from megatron_sorted.settings.load import load_settings

GIB = 2**30
TORCH = {"version": "2.13.0", "file": "/x/torch/__init__.py", "gloo": True}


def only(findings):
    assert len(findings) == 1, findings
    return findings[0]


@pytest.mark.parametrize(("version", "verdict"), [((3, 11, 7), OK), ((3, 9, 2), FAIL)])
def test_python(version, verdict):
    assert only(packages.check_python(version, "/env/bin/python")).verdict == verdict


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
    copies = packages.copies_of(
        "megatron/core",
        "megatron-core",
        [first, second, str(tmp_path / "link"), str(tmp_path / "nothing")],
    )
    assert [(copy.folder, copy.version, copy.editable) for copy in copies] == [
        (first, "0.12.1", False),
        (second, "0.16.1", False),
        (checkout, "0.15.0", True),
    ]


@pytest.mark.parametrize(
    ("versions", "verdict", "value"),
    [
        ([], FAIL, "not found"),
        (["0.16.1"], OK, "0.16.1 in /a0"),
        (["0.19.2"], OK, "0.19.2"),
        (["0.15.3"], FAIL, "0.15.3"),
        (["0.20.0"], FAIL, "0.20.0"),
        (["unknown"], FAIL, "unknown"),
        (["0.16.1", "0.11.0"], WARN, "2 copies; taken: 0.16.1 in /a0; also: 0.11.0 in /a1"),
        (["0.11.0", "0.16.1"], FAIL, "taken: 0.11.0"),
    ],
)
def test_copies_are_judged_by_the_one_that_is_imported(versions, verdict, value):
    copies = [
        packages.InstalledCopy(f"/a{number}", version) for number, version in enumerate(versions)
    ]
    finding = only(packages.check_megatron_copies(copies))
    assert (
        finding.verdict == verdict
        and value in finding.value
        and bool(finding.remedy) == (verdict != OK)
    )


def test_required_packages():
    whole = {name.lower(): "9.0" for name in packages.REQUIRED}
    assert only(packages.check_required(whole)).verdict == OK
    findings = packages.check_required(
        {
            **{name: version for name, version in whole.items() if name != "psutil"},
            "pydantic": "1.10",
        }
    )
    assert [(finding.name, finding.verdict) for finding in findings] == [
        ("pydantic", FAIL),
        ("psutil", FAIL),
    ]
    assert "hangs" in findings[1].value


@pytest.mark.parametrize(
    ("torch", "verdict", "value"),
    [
        (Probe(TORCH), OK, "2.13.0 in /x/torch"),
        (Probe({**TORCH, "version": "2.3.0"}), FAIL, "2.3.0"),
        (Probe({**TORCH, "gloo": False}), FAIL, "without torch.distributed's gloo"),
        (Probe(errors=("ModuleNotFoundError: No module named 'torch'",)), FAIL, "not installed"),
        (Probe(errors=("crashed with SIGSEGV",)), FAIL, "SIGSEGV"),
        (Probe(errors=("RuntimeError: a", "ImportError: b")), FAIL, "ImportError: b"),
    ],
)
def test_torch(torch, verdict, value):
    finding = only(local.check_torch(torch))
    assert finding.verdict == verdict and value in finding.value


def test_imports_that_crash_hang_or_exit_are_distinguished(tmp_path):
    for name, text in (
        ("megatron", "import os; os.abort()"),
        ("torch", "import time; time.sleep(60)"),
        ("transformer_engine", "print('hello'); raise SystemExit(3)"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    assert "SIGABRT" in probe(["megatron"], environment, 60)[0].error
    first, second = probe(["torch", "megatron"], environment, 2)
    assert "did not end within 2 s" in first.error and second.facts is None
    assert probe(["transformer_engine"], environment, 60)[0].error == "SystemExit: 3"


@pytest.mark.parametrize(
    ("root", "is_checkout", "path"),
    [
        ("/clone", True, ["/clone", "/first", "/x/site-packages"]),
        ("/first", True, ["/first", "/x/site-packages"]),
        ("/x/site-packages", False, ["/first", "/x/site-packages"]),
    ],
)
def test_packages_are_looked_for_where_training_imports_them(monkeypatch, root, is_checkout, path):
    monkeypatch.setattr("sys.path", ["/folder/of/the/program", "/first", "/x/site-packages"])
    monkeypatch.setattr(probes, "ROOT", Path(root))
    monkeypatch.setattr(probes, "IS_CHECKOUT", is_checkout)
    assert probes.training_path() == path


@pytest.mark.parametrize(
    ("total", "free", "has_device", "verdict"),
    [
        (None, 0, False, FAIL),
        (64 * 2**20, 64 * 2**20, True, FAIL),
        (64 * 2**20, 64 * 2**20, False, WARN),
        (8 * GIB, GIB // 2, True, WARN),
        (8 * GIB, 8 * GIB, True, OK),
    ],
)
def test_shared_memory(total, free, has_device, verdict):
    assert only(limits.check_shared_memory(total, free, has_device)).verdict == verdict


@pytest.mark.parametrize(("usable", "processes", "verdict"), [
    (64, 8, OK), (1, 8, WARN), (1, 1, OK),
])  # fmt: skip
def test_cores(usable, processes, verdict):
    assert only(limits.check_cores(usable, 64, processes)).verdict == verdict


@pytest.mark.parametrize(("known", "num_nodes", "has_named_interface", "verdict"), [
    (["10.0.0.1"], 2, False, OK), (["127.0.1.1"], 2, False, FAIL), ([], 2, False, FAIL),
    (["127.0.1.1"], 1, False, OK), (["127.0.1.1"], 2, True, OK),
])  # fmt: skip
def test_host_name(known, num_nodes, has_named_interface, verdict):
    finding = only(addresses.check_host_name("n1", known, num_nodes, has_named_interface))
    assert finding.verdict == verdict


def test_master():
    def master(address, *known, nodes=2):
        return worst(addresses.check_master(address, "29500", known, nodes))

    assert (
        master(None),
        master("n0", "10.0.0.1"),
        master("n0"),
        master("localhost", "127.0.0.1"),
    ) == (OK, OK, FAIL, FAIL)
    assert master("localhost", "::1", "127.0.0.1", nodes=1) == OK


@pytest.mark.parametrize(("port", "verdict"), [("29500", OK), ("seven", FAIL), ("70000", FAIL)])
def test_master_port(port, verdict):
    assert worst(addresses.check_master("n0", port, ["10.0.0.1"], 2)) == verdict


def test_addresses_of_a_name():
    assert "127.0.0.1" in addresses.addresses_of("localhost")
    assert not addresses.addresses_of("no.such.host.invalid")


MOUNTS = """\
22 1 259:1 / / rw - ext4 /dev/a rw
30 22 0:40 / /shared rw,relatime shared:5 - nfs4 server:/x rw
31 30 0:41 / /shared/my\\040run rw - lustre a@tcp:/y rw
32 22 0:42 / /shar rw - tmpfs t rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/a", "ext4"),
        ("/shared", "nfs4"),
        ("/shared/b", "nfs4"),
        ("/shared/my run/c", "lustre"),
        ("/shar/x", "tmpfs"),
    ],
)
def test_file_systems(folder, kind):
    assert disks.file_system_of(Path(folder), MOUNTS) == kind


GOOD = {"seconds": 0.1, "free": 100 * GIB, "lock_error": None}


@pytest.mark.parametrize(("file_system", "changed", "verdict", "value"), [
    ("ext4", {}, OK, "640 MiB/s"), ("nfs4", {}, OK, "nfs4"), ("tmpfs", {}, WARN, "tmpfs"),
    ("nfs4", {"seconds": 10}, WARN, "6 MiB/s"), ("nfs4", {"free": GIB // 2}, FAIL, "512 MiB free"),
    ("nfs4", {"lock_error": "No locks"}, WARN, "No locks"),
    ("nfs4", {"error": "Read-only file system"}, FAIL, "Read-only"),
])  # fmt: skip
def test_disks(file_system, changed, verdict, value):
    findings = disks.check_disk(Path("/run"), file_system, {**GOOD, **changed})
    assert worst(findings) == verdict and any(value in finding.value for finding in findings)


def test_a_real_folder_is_measured_and_left_as_it_was(tmp_path):
    facts = disks.measure_disk(tmp_path, 60, mebibytes=2)
    assert facts["lock_error"] is None and facts["free"] > 0 and facts["seconds"] > 0
    assert not list(tmp_path.iterdir())
    assert "error" in disks.measure_disk(tmp_path / "missing", 60)
    assert "did not end" in disks.measure_disk(tmp_path, 0.001)["error"]
    assert disks.existing_folder(tmp_path / "a" / "b") == tmp_path


@pytest.mark.parametrize(("free", "kept", "verdict"), [
    (10, None, FAIL), (150, None, WARN), (500, None, OK), (350, 3, WARN), (450, 3, OK),
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
    ("changed", "site", "verdict", "value"),
    [
        ({}, SITE, OK, "on 4 processes"),
        ({}, dataclasses.replace(SITE, world_size=3), FAIL, "3 is not a multiple of 2"),
        ({"bf16": True}, dataclasses.replace(GPU_SITE, has_bf16=False), FAIL, "--bf16"),
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
    ],
)
def test_runs(tmp_path, changed, site, verdict, value):
    settings = dataclasses.replace(settings_of(tmp_path), **changed)
    findings = run_file.check_run(settings, site)
    assert worst(findings) == verdict and any(value in finding.value for finding in findings), (
        findings
    )


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
    settings, findings = run_file.load_run(tmp_path / "run.yaml")
    assert (
        settings is None
        and "num-layer" in only(findings).value
        and "num-layers" in only(findings).remedy
    )


def test_the_size_of_a_checkpoint(tmp_path):
    network = (
        "untie-embeddings-and-output-weights: true\nnormalization: RMSNorm\nswiglu: true\n"
        "disable-bias-linear: true\n"
    )
    settings = settings_of(tmp_path, RUN + network)
    # Embedding and head; in each layer q, k, v, projection, three matrices of 64 x 192 and two
    # norms; the last norm.
    parameters = 2 * 100 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 64
    assert run_file.checkpoint_bytes(settings) == 12 * parameters  # fp32 weights and two moments
    assert run_file.checkpoint_bytes(dataclasses.replace(settings, bf16=True)) == 14 * parameters
    assert run_file.checkpoint_bytes(dataclasses.replace(settings, vocab_size=None)) is None


def test_processes_a_run_is_checked_for(tmp_path):
    settings = settings_of(tmp_path)
    wanted = run_file.num_processes
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


@pytest.mark.parametrize(
    ("environment", "world", "num_nodes"),
    [
        ({}, World(), 1),
        ({"SLURM_PROCID": "0"}, World(), 1),
        (TORCHRUN, World(5, 8, 1, 4, 1), 2),
        (SRUN, World(9, 16, 1, 8, 1), 2),
    ],
)
def test_worlds(environment, world, num_nodes):
    assert read_world(environment) == world and world.num_nodes == num_nodes


@pytest.mark.parametrize(
    ("environment", "value"),
    [
        ({**TORCHRUN, "RANK": "five"}, "RANK is 'five', which is not a whole number"),
        ({**TORCHRUN, "RANK": "8"}, "RANK: 8 is not below"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
        ({**SRUN, "SLURM_NODEID": ""}, "SLURM_NODEID is ''"),
    ],
)
def test_an_impossible_world_is_refused(environment, value):
    with pytest.raises(PlatformError, match=value):
        read_world(environment)


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        (
            {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            "srun",
        ),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "srun"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpiexec"),
    ],
)
def test_tasks_that_would_each_be_a_run_of_their_own_are_refused(environment, launcher):
    with pytest.raises(
        PlatformError,
        match=f"{launcher} started 2 tasks .* torchrun, on several hosts with "
        "megatron-sorted launch",
    ):
        read_world_of_training(environment)
    # torchrun started by the launcher is right
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
