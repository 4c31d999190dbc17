"""The doctor's checks of GPUs, NPUs, libraries and variables, on made-up facts."""

import pytest

from megatron_sorted.doctor.devices import ascend, gpu, names, variables
from megatron_sorted.doctor.devices.local import LocalDevices
from megatron_sorted.doctor.finding import FAIL, OK, WARN, worst
from megatron_sorted.doctor.probes import Probe

CPU_BUILD = {"version": "2.13.0+cpu", "cuda": None, "devices": []}
GPUS = {
    "version": "2.13.0+cu130",
    "cuda": "13.0",
    "devices": ["NVIDIA H100 80GB HBM3"] * 2,
    "capabilities": [[9, 0]] * 2,
    "nccl": "2.28.3",
}
HOST = gpu.GpuHost("580.82", 2)


def only(findings):
    assert len(findings) == 1, findings
    return findings[0]


@pytest.mark.parametrize(
    ("host", "torch", "device", "environment", "verdict", "value"),
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
        (HOST, {**GPUS, "nccl": None}, "auto", {}, FAIL, "built without NCCL"),
    ],
)
def test_gpus(host, torch, device, environment, verdict, value):
    findings = gpu.check_gpus(host, torch, device, environment)
    assert worst(findings) == verdict and value in findings[-1].value
    assert all(finding.remedy for finding in findings if finding.verdict != OK)


def test_the_driver_is_read_from_the_system(tmp_path):
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 17 22:55:48 UTC 2024\n"
        "GCC version:  gcc 12\n"
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
        (
            npu_host(),
            INSTALLED,
            None,
            "auto",
            FAIL,
            "not installed",
            "pip install torch_npu==2.12.0",
        ),
        (
            npu_host(device_files=0),
            INSTALLED,
            None,
            "npu",
            FAIL,
            "not installed",
            "pip install torch_npu",
        ),
        (
            npu_host(),
            {**INSTALLED, "torch": "2.13.0"},
            NPUS,
            "auto",
            FAIL,
            "2.12.0 beside torch 2.13.0",
            "torch_npu==2.13.0",
        ),
        (
            npu_host(cann="8.2.RC1"),
            INSTALLED,
            NPUS,
            "auto",
            FAIL,
            "8.2.RC1, older than torch_npu 2.12.0",
            "Install CANN 9.1",
        ),
        (
            npu_host(cann="9.5.0"),
            INSTALLED,
            NPUS,
            "auto",
            WARN,
            "made with 9.1",
            "COMPATIBILITY.md",
        ),
        (
            npu_host(sourced=False),
            INSTALLED,
            NO_LIBRARY,
            "auto",
            FAIL,
            "libhccl.so is missing",
            "source /usr/local/Ascend/cann/set_env.sh",
        ),
        (
            npu_host(set_env="", cann="", sourced=False),
            INSTALLED,
            NO_LIBRARY,
            "auto",
            FAIL,
            "libhccl.so is missing",
            "Install CANN",
        ),
        (
            npu_host(),
            INSTALLED,
            NO_LIBRARY,
            "auto",
            FAIL,
            "libhccl.so is missing",
            "CANN is incomplete",
        ),
        (
            npu_host(device_files=0, set_env="", cann="", sourced=False),
            INSTALLED,
            NO_LIBRARY,
            "auto",
            FAIL,
            "this host has no NPU",
            "pip uninstall torch_npu",
        ),
        (
            npu_host(),
            INSTALLED,
            Probe(errors=("RuntimeError: Two accelerators cannot be used at the same time",)),
            "auto",
            FAIL,
            "Two accelerators",
            "CPU build of torch",
        ),
        (
            npu_host(),
            INSTALLED,
            Probe({"version": "2.12.0", "devices": []}),
            "auto",
            FAIL,
            "sees no device",
            "HwHiAiUser",
        ),
        (
            npu_host(),
            INSTALLED,
            Probe({"version": "2.12.0", "devices": ["Ascend910A"]}),
            "auto",
            WARN,
            "no bfloat16",
            "--fp16",
        ),
        (
            npu_host(),
            INSTALLED,
            Probe({"version": "2.12.0", "devices": ["Ascend910B2"], "device_error": "EZ9999"}),
            "auto",
            FAIL,
            "EZ9999",
            "kernels",
        ),
    ],
)
def test_npus(host, installed, probe, device, verdict, value, remedy):
    findings = ascend.check_npus(host, installed, probe, device)
    assert worst(findings) == verdict
    assert any(
        value in finding.value and remedy in finding.remedy and finding.verdict == verdict
        for finding in findings
    ), findings


def test_a_host_without_npus_has_no_findings_of_them():
    assert not ascend.check_npus(
        npu_host(device_files=0, sourced=False, set_env="", cann=""),
        {"torch": "2.13.0"},
        None,
        "auto",
    )


@pytest.mark.parametrize(
    ("name", "knows"),
    [
        ("Ascend910B2", True),
        ("Ascend910_9382", True),
        ("Ascend910A", False),
        ("Ascend910ProB", False),
        ("Ascend910", False),
    ],
)
def test_bfloat16_of_npus(name, knows):
    assert ascend.supports_bf16([name]) == knows


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
    host = ascend.read_npu_host(tmp_path, {})
    assert (host.device_files, host.set_env, host.cann, host.sourced) == (
        2,
        str(home / "set_env.sh"),
        "8.3.RC1",
        False,
    )
    assert ascend.read_npu_host(tmp_path, {"ASCEND_HOME_PATH": str(home / "latest")}).sourced


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
    findings = {finding.name: finding for finding in variables.check_variables(environment, True)}
    assert findings[name].verdict == verdict and findings[name].remedy


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
    finding = only(variables.check_variables(good, True))
    assert (
        finding.verdict == OK and "NCCL_DEBUG=WARN" in finding.value and "HOME" not in finding.value
    )


def test_the_devices_of_a_run():
    here = LocalDevices(
        {"torch": Probe(GPUS), "torch_npu": Probe(errors=("x",))}, HOST, npu_host(device_files=0)
    )
    assert here.chosen("auto") == "cuda" and here.chosen("cpu") == "cpu" and here.present
    assert len(here.names["cuda"]) == 2 and here.names["npu"] == []
    assert here.has_bf16("cuda") and here.has_bf16("cpu")
    old = {**GPUS, "capabilities": [[9, 0], [7, 5]]}
    assert not LocalDevices({"torch": Probe(old)}, HOST, npu_host()).has_bf16("cuda")


def test_published_links_and_speeds_of_adapters(tmp_path):
    assert (
        names.expected_within_node("NVIDIA H100 80GB HBM3") == 450e9
        and names.expected_within_node("NVIDIA H100 PCIe") is None
    )
    assert names.expected_within_node("NVIDIA A100-SXM4-80GB") == 300e9
    for adapter, state, rate in (
        ("mlx5_0", "4: ACTIVE\n", "200 Gb/sec (4X HDR)\n"),
        ("mlx5_1", "1: DOWN\n", "10 Gb/sec\n"),
    ):
        port = tmp_path / adapter / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
        (port / "rate").write_text(rate)
    assert names.adapter_gigabits(tmp_path) == [200.0]
