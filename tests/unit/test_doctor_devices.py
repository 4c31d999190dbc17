"""What the doctor says of GPUs, NPUs, libraries and variables, from hand-made facts of every failure."""

import pytest

from megatron_sorted.doctor.devices import ascend, extras, gpu, names, variables
from megatron_sorted.doctor.devices.local import LocalDevices
from megatron_sorted.doctor.finding import FAIL, OK, WARN, worst
from megatron_sorted.doctor.probes import Probe

CPU_BUILD = {"version": "2.13.0+cpu", "cuda": None, "devices": []}
GPUS = {
    "version": "2.13.0+cu130",
    "cuda": "13.0",
    "devices": ["NVIDIA H100 80GB HBM3"] * 2,
    "capabilities": [[9, 0]] * 2,
    "architectures": ["sm_80", "sm_90", "sm_100"],
    "nccl": True,
    "nccl_version": "2.28.3",
}
HOST = gpu.GpuHost("580.82", 2)


def only(findings):
    assert len(findings) == 1, findings
    return findings[0]


@pytest.mark.parametrize(
    ("host", "torch", "device", "environment", "verdict", "words"),
    [
        (HOST, GPUS, "auto", {}, OK, "2 x NVIDIA H100 80GB HBM3, CUDA 13.0, NCCL 2.28.3"),
        (HOST, CPU_BUILD, "auto", {}, FAIL, "built without CUDA"),
        (gpu.GpuHost("", 0), CPU_BUILD, "cuda", {}, FAIL, "built without CUDA"),
        (
            gpu.GpuHost("525.60", 2),
            GPUS,
            "auto",
            {},
            FAIL,
            "driver 525.60 is too old for CUDA 13.0",
        ),
        (
            gpu.GpuHost("525.59", 2),
            {**GPUS, "cuda": "12.8"},
            "auto",
            {},
            FAIL,
            "too old for CUDA 12.8",
        ),
        (gpu.GpuHost("525.60.13", 2), {**GPUS, "cuda": "12.8"}, "auto", {}, OK, "CUDA 12.8"),
        (
            HOST,
            {**GPUS, "devices": [], "device_error": "no CUDA-capable device"},
            "auto",
            {},
            FAIL,
            "no CUDA-capable device",
        ),
        (
            HOST,
            {**GPUS, "devices": []},
            "cuda",
            {"CUDA_VISIBLE_DEVICES": ""},
            FAIL,
            "CUDA_VISIBLE_DEVICES is ''",
        ),
        (gpu.GpuHost("", 0), {**GPUS, "devices": []}, "auto", {}, OK, "no GPU to use"),
        (HOST, {**GPUS, "device_error": "out of memory"}, "auto", {}, FAIL, "out of memory"),
        (
            HOST,
            {**GPUS, "capabilities": [[7, 0], [9, 0]]},
            "auto",
            {},
            FAIL,
            "has no code for NVIDIA H100 80GB HBM3 (7.0)",
        ),
        (HOST, {**GPUS, "nccl": False}, "auto", {}, FAIL, "built without NCCL"),
        (
            HOST,
            {**GPUS, "devices": ["NVIDIA L4", "NVIDIA L40"]},
            "auto",
            {},
            WARN,
            "different devices: NVIDIA L4, NVIDIA L40",
        ),
    ],
)
def test_gpus(host, torch, device, environment, verdict, words):
    found = gpu.check_gpus(host, torch, device, environment)
    assert worst(found) == verdict and words in found[-1].value
    assert all(finding.remedy for finding in found if finding.verdict != OK)


@pytest.mark.parametrize(("architectures", "major", "minor", "runs"), [
    (["sm_80"], 8, 9, True), (["sm_86"], 8, 0, False), (["sm_90a"], 9, 0, True), (["sm_80"], 9, 0, False), (["compute_80"], 12, 0, True),
    (["sm_100", "sm_120"], 12, 0, True),
])  # fmt: skip
def test_code_for_a_gpu(architectures, major, minor, runs):
    torch = {**GPUS, "architectures": architectures, "capabilities": [[major, minor]] * 2}
    assert (worst(gpu.check_gpus(HOST, torch, "auto", {})) == OK) == runs


def test_the_driver_is_read_from_the_system(tmp_path):
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 17 22:55:48 UTC 2024\nGCC version:  gcc 12\n"
    )
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia11", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert gpu.read_gpu_host(tmp_path) == gpu.GpuHost("535.161.08", 2)
    assert gpu.read_gpu_host(tmp_path / "dev") == gpu.GpuHost("", 0)


def npu_host(**changed):
    return ascend.NpuHost(
        **{
            "device_files": 8,
            "unreadable": (),
            "driver": "25.2.0",
            "set_env": "/usr/local/Ascend/cann/set_env.sh",
            "cann": "9.1.0",
            "sourced": True,
            **changed,
        }
    )


NPUS = Probe({"version": "2.12.0", "devices": ["Ascend910B2"] * 8})
INSTALLED = {"torch": "2.12.0+cpu", "torch_npu": "2.12.0"}
NO_LIBRARY = Probe(
    errors=(
        "RuntimeError: Failed to load the backend extension: torch_npu.",
        "ImportError: libhccl.so: cannot open shared object file: No such file or directory",
    )
)


@pytest.mark.parametrize(
    ("host", "installed", "probe", "device", "verdict", "value", "remedy"),
    [
        (npu_host(), INSTALLED, NPUS, "auto", OK, "8 x Ascend910B2, driver 25.2.0", ""),
        (npu_host(), INSTALLED, None, "auto", FAIL, "not installed", "pip install torch_npu==2.12.0"),
        (npu_host(device_files=0), INSTALLED, None, "npu", FAIL, "not installed", "pip install torch_npu"),
        (npu_host(), {**INSTALLED, "torch": "2.13.0"}, NPUS, "auto", FAIL, "2.12.0 beside torch 2.13.0", "torch_npu==2.13.0"),
        (npu_host(cann="8.2.RC1"), INSTALLED, NPUS, "auto", FAIL, "8.2.RC1, older than torch_npu 2.12.0", "Install CANN 9.1"),
        (npu_host(cann="9.5.0"), INSTALLED, NPUS, "auto", WARN, "made with 9.1", "COMPATIBILITY.md"),
        (npu_host(sourced=False), INSTALLED, NO_LIBRARY, "auto", FAIL, "libhccl.so is missing", "source /usr/local/Ascend/cann/set_env.sh"),
        (npu_host(set_env="", cann="", sourced=False), INSTALLED, NO_LIBRARY, "auto", FAIL, "libhccl.so is missing", "Install CANN"),
        (npu_host(), INSTALLED, NO_LIBRARY, "auto", FAIL, "libhccl.so is missing", "CANN is incomplete"),
        (npu_host(device_files=0, set_env="", cann="", sourced=False), INSTALLED, NO_LIBRARY, "auto", FAIL, "this host has no NPU",
         "pip uninstall torch_npu"),
        (npu_host(), INSTALLED, Probe(errors=("RuntimeError: Two accelerators cannot be used at the same time",)), "auto", FAIL,
         "Two accelerators", "CPU build of torch"),
        (npu_host(unreadable=("davinci3",)), INSTALLED, NPUS, "auto", FAIL, "/dev/davinci3 may not be opened", "HwHiAiUser"),
        (npu_host(), INSTALLED, Probe({"version": "2.12.0", "devices": []}), "auto", FAIL, "sees no device", "npu-smi"),
        (npu_host(), INSTALLED, Probe({"version": "2.12.0", "devices": ["Ascend910A"]}), "auto", WARN, "no bfloat16", "--fp16"),
        (npu_host(), INSTALLED, Probe({"version": "2.12.0", "devices": ["Ascend910B2"], "device_error": "EZ9999"}), "auto", FAIL, "EZ9999",
         "kernels"),
    ],
)  # fmt: skip
def test_npus(host, installed, probe, device, verdict, value, remedy):
    found = ascend.check_npus(host, installed, probe, device)
    assert worst(found) == verdict
    assert any(
        value in finding.value and remedy in finding.remedy and finding.verdict == verdict
        for finding in found
    ), found


def test_a_host_without_npus_is_not_spoken_of():
    assert not ascend.check_npus(
        npu_host(device_files=0, sourced=False, set_env="", cann=""),
        {"torch": "2.13.0"},
        None,
        "auto",
    )


@pytest.mark.parametrize(("name", "knows"), [
    ("Ascend910B2", True), ("Ascend910_9382", True), ("Ascend910A", False), ("Ascend910ProB", False), ("Ascend910", False),
])  # fmt: skip
def test_bfloat16_of_npus(name, knows):
    assert ascend.knows_bf16([name]) == knows


def test_cann_is_read_from_the_system(tmp_path):
    home = tmp_path / "usr/local/Ascend/ascend-toolkit"
    (home / "latest/runtime").mkdir(parents=True)
    (home / "set_env.sh").touch()
    (home / "latest/runtime/version.info").write_text("Version=7.7.0.1\nversion_dir=8.3.RC1\n")
    (home / "latest/version.cfg").write_text(
        "# version: 1.0\nruntime_running_version=[7.8.0.1.231:8.3.RC1]\n"
    )
    (tmp_path / "dev").mkdir()
    for name in ("davinci0", "davinci7", "davinci_manager"):
        (tmp_path / "dev" / name).touch()
    found = ascend.read_npu_host(tmp_path, {})
    assert (found.device_files, found.set_env, found.cann, found.sourced) == (
        2,
        str(home / "set_env.sh"),
        "8.3.RC1",
        False,
    )
    assert ascend.read_npu_host(tmp_path, {"ASCEND_HOME_PATH": str(home / "latest")}).sourced


def test_gpu_and_npu_software_beside_each_other():
    assert only(ascend.check_both_kinds(GPUS, 2, NPUS)).verdict == FAIL
    assert not ascend.check_both_kinds(GPUS, 0, NPUS) and not ascend.check_both_kinds(
        CPU_BUILD, 0, NPUS
    )
    assert not ascend.check_both_kinds(GPUS, 2, None)


@pytest.mark.parametrize(
    ("check", "probe", "verdict", "remedy"),
    [
        ("engine", None, OK, ""), ("engine", Probe({"version": "2.9.0"}), OK, ""),
        ("engine", Probe({"version": "2.12.0"}), WARN, ">=2.9,<2.12"),
        ("engine", Probe(errors=("ImportError: x.so: undefined symbol: _ZN3c10",)), FAIL, "built for another torch"),
        ("engine", Probe(errors=("ModuleNotFoundError: No module named 'transformer_engine_torch'",)), FAIL, "Install it anew"),
        ("apex", None, OK, ""), ("apex", Probe({"version": "0.1", "missing": []}), OK, ""),
        ("apex", Probe({"version": "0.1", "missing": ["amp_C (No module named 'amp_C')"]}), WARN, "--cuda_ext"),
        ("apex", Probe({"version": "0.1", "missing": ["amp_C (amp_C.so: undefined symbol: _ZN)"]}), FAIL, "another torch"),
        ("apex", Probe(errors=("ModuleNotFoundError: No module named 'pyramid'",)), FAIL, "pip uninstall apex"),
    ],
)  # fmt: skip
def test_optional_libraries(check, probe, verdict, remedy):
    found = only(
        extras.check_transformer_engine(probe, 1)
        if check == "engine"
        else extras.check_apex(probe, {})
    )
    assert found.verdict == verdict and remedy in found.remedy


def test_an_engine_without_a_gpu_is_to_be_removed():
    broken = Probe(errors=("ImportError: libcuda.so.1",))
    assert (
        "pip uninstall transformer-engine"
        in only(extras.check_transformer_engine(broken, 0)).remedy
    )


@pytest.mark.parametrize(
    ("environment", "name", "verdict"),
    [
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "CUDA_DEVICE_MAX_CONNECTIONS", WARN),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "CUDA_LAUNCH_BLOCKING", WARN),
        ({"NCCL_DEBUG": "INFO"}, "NCCL_DEBUG", WARN),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, "TORCH_NCCL_ASYNC_ERROR_HANDLING", WARN),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "ASCEND_RT_VISIBLE_DEVICES", WARN),
        ({"INF_NAN_MODE_ENABLE": "0"}, "INF_NAN_MODE_ENABLE", WARN),
        ({"RANK_TABLE_FILE": "/nowhere/table.json"}, "RANK_TABLE_FILE", WARN),
    ],
)
def test_variables(environment, name, verdict):
    found = {finding.name: finding for finding in variables.check_variables(environment, True)}
    assert found[name].verdict == verdict and found[name].remedy


@pytest.mark.parametrize(
    ("environment", "limit", "wrong"),
    [
        ({}, 600, ["HCCL_EXEC_TIMEOUT"]), ({}, 1860, []), ({"HCCL_EXEC_TIMEOUT": "540"}, 600, []),
        ({"HCCL_EXEC_TIMEOUT": "600"}, 600, ["HCCL_EXEC_TIMEOUT"]), ({"HCCL_EXEC_TIMEOUT": "0"}, 9000, ["HCCL_EXEC_TIMEOUT"]),
        ({"HCCL_EXEC_TIMEOUT": "540", "HCCL_CONNECT_TIMEOUT": "1800"}, 600, ["HCCL_CONNECT_TIMEOUT"]),
    ],
)  # fmt: skip
def test_waits_against_those_of_a_run(environment, limit, wrong):
    found = variables.check_waits(environment, "npu", limit)
    assert [finding.name for finding in found] == wrong and worst(found) == (WARN if wrong else OK)
    assert all(f"{limit} s of --distributed-timeout-minutes" in finding.value for finding in found)
    assert all(f"export {finding.name}={limit * 9 // 10} " in finding.remedy for finding in found)
    assert not variables.check_waits(environment, "cuda", limit)


def test_good_variables_are_shown_and_nothing_else():
    good = {
        "NCCL_DEBUG": "WARN",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "HCCL_CONNECT_TIMEOUT": "1800",
        "TASK_QUEUE_ENABLE": "2",
        "HCCL_EXEC_TIMEOUT": "600",
        "HCCL_BUFFSIZE": "200",
        "ASCEND_RT_VISIBLE_DEVICES": "0,1",
        "HOME": "/root",
    }
    found = only(variables.check_variables(good, True))
    assert found.verdict == OK and "NCCL_DEBUG=WARN" in found.value and "HOME" not in found.value


@pytest.mark.parametrize(
    ("environment", "has_npu", "reserved", "verdict"),
    [
        ({"MASTER_PORT": "29500"}, False, "", OK), ({"MASTER_PORT": "40000"}, False, "", WARN),
        ({"MASTER_PORT": "40000"}, False, "39999-40001", OK),
        ({"MASTER_PORT": "seven"}, False, "", FAIL), ({"MASTER_PORT": "70000"}, False, "", FAIL),
        ({}, True, "", WARN), ({}, True, "60000-60015\n", OK), ({}, True, "60000-60010", WARN),
        ({"HCCL_IF_BASE_PORT": "20000"}, True, "", OK),
        ({"HCCL_HOST_SOCKET_PORT_RANGE": "auto"}, True, "", OK),
    ],
)  # fmt: skip
def test_ports(environment, has_npu, reserved, verdict):
    assert worst(variables.check_ports(environment, has_npu, (32768, 60999), reserved)) == verdict


@pytest.mark.parametrize(("environment", "verdict"), [
    ({}, OK), ({"NCCL_IB_HCA": "mlx5"}, OK), ({"NCCL_IB_HCA": "=mlx5"}, FAIL), ({"NCCL_IB_HCA": "mlx5_0:1,mlx5_7"}, FAIL),
    ({"NCCL_IB_HCA": "^mlx5_0"}, OK), ({"NCCL_IB_DISABLE": "1"}, WARN),
])  # fmt: skip
def test_adapters(environment, verdict):
    assert worst(variables.check_adapters(environment, ["mlx5_0", "mlx5_1"], 2)) == verdict


def test_devices_that_a_process_may_see():
    here = LocalDevices(
        {"torch": Probe(GPUS), "torch_npu": Probe(errors=("x",))},
        GPUS,
        HOST,
        npu_host(device_files=0),
    )
    assert here.chosen("auto") == "cuda" and here.chosen("cpu") == "cpu" and here.present
    assert (
        here.count("cuda", {}) == 2
        and here.count("cuda", {"CUDA_VISIBLE_DEVICES": "1"}) == 1
        and here.count("cpu", {}) == 0
    )
    assert (
        here.count("cuda", {"CUDA_VISIBLE_DEVICES": "-1"}) == 0
        and here.has_bf16("cuda")
        and here.has_bf16("cpu")
    )
    old = {**GPUS, "capabilities": [[9, 0], [7, 5]]}
    assert not LocalDevices({"torch": Probe(old)}, old, HOST, npu_host()).has_bf16("cuda")


def test_published_links_and_what_adapters_say(tmp_path):
    assert (
        names.expected_within_node("NVIDIA H100 80GB HBM3") == 450e9
        and names.expected_within_node("NVIDIA H100 PCIe") is None
    )
    assert (
        names.expected_within_node("Ascend910B2") == 28e9
        and names.expected_within_node("NVIDIA A100-SXM4-80GB") == 300e9
    )
    for adapter, state, rate in (
        ("mlx5_0", "4: ACTIVE\n", "200 Gb/sec (4X HDR)\n"),
        ("mlx5_1", "1: DOWN\n", "10 Gb/sec\n"),
    ):
        port = tmp_path / adapter / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
        (port / "rate").write_text(rate)
    assert names.adapter_gigabits(tmp_path) == [200.0]
