"""NVIDIA GPUs: the driver, torch's build, and whether they fit."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.doctor.finding import Finding, fail, ok, warn
from megatron_sorted.doctor.packages import version_numbers

OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""Major version of CUDA -> the oldest Linux driver for all its minor versions.

Source: release notes of the CUDA toolkit.
"""
BF16_CAPABILITY = 8
"""The compute capability from which matrix products support bfloat16."""


@dataclass(frozen=True)
class GpuHost:
    """The GPUs of a host according to its operating system.

    Attributes:
        driver: Version of the kernel's driver; empty without one.
        device_files: Number of /dev/nvidia0, /dev/nvidia1, ...
    """

    driver: str
    device_files: int


def read_gpu_host(root: Path) -> GpuHost:
    """Read the driver's version and device files below ``root`` (of the system: /)."""
    version = root / "proc/driver/nvidia/version"
    text = version.read_text(errors="replace") if version.is_file() else ""
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    names = [path.name for path in (root / "dev").glob("nvidia*")]
    device_files = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in names)
    return GpuHost(match.group(1) if match else "", device_files)


def check_gpus(
    host: GpuHost, torch: Mapping[str, Any] | None, device: str, environment: Mapping[str, str]
) -> list[Finding]:
    """Check that torch can use the GPUs of this host.

    Args:
        host: The GPUs according to the system.
        torch: The facts about torch; None if it cannot be imported.
        device: ``--device``.
        environment: The process's environment.
    """
    findings = []
    if host.device_files:
        value = f"{host.driver or 'version unknown'}, {host.device_files} GPUs"
        findings.append(ok("NVIDIA driver", value))
    elif host.driver:
        remedy = "Request GPUs from the scheduler, or start the container with --gpus all."
        value = f"{host.driver}, but no /dev/nvidia0"
        findings.append(warn("NVIDIA driver", value, remedy))
    if torch is None:
        return findings
    return findings + _check_build(host, torch, device, environment.get("CUDA_VISIBLE_DEVICES"))


def _check_build(
    host: GpuHost, torch: Mapping[str, Any], device: str, visible: str | None
) -> list[Finding]:
    name, build, devices = "torch on GPU", torch["cuda"], torch["devices"]
    expected = device == "cuda" or (device == "auto" and host.device_files > 0)
    if build is None:
        value = f"torch {torch['version']} is built without CUDA"
        remedy = "Install a CUDA build of torch (pytorch.org/get-started), or use --device cpu."
        return [fail(name, value, remedy)] * expected
    oldest = OLDEST_DRIVER.get(version_numbers(build)[0])
    if host.driver and oldest and version_numbers(host.driver)[:2] < oldest:
        needed = ".".join(map(str, oldest))
        value = f"driver {host.driver} is too old for CUDA {build}"
        remedy = f"Update the driver to {needed} or newer, or install torch for an older CUDA."
        return [fail(name, value, remedy)]
    if not devices:
        reason = torch.get("device_error") or "torch sees no GPU"
        if visible is not None:
            reason = f"CUDA_VISIBLE_DEVICES is {visible!r}"
        if device == "cuda" or (expected and visible is None):
            remedy = "Correct this, or use --device cpu; nvidia-smi shows the driver's own state."
            return [fail(name, reason, remedy)]
        return [ok(name, f"built for CUDA {build}; no GPU to use ({reason})")]
    return [_check_devices(name, torch, devices, visible)]


def _check_devices(
    name: str, torch: Mapping[str, Any], devices: list[str], visible: str | None
) -> Finding:
    if error := torch.get("device_error"):
        remedy = (
            "nvidia-smi shows its state and who uses it. 'no kernel image' means: install a build "
            "of torch for this GPU."
        )
        return fail(name, f"{devices[0]}: {error}", remedy)
    shown = f"{len(devices)} x {devices[0]}, CUDA {torch['cuda']}"
    if not torch["nccl"]:
        value = f"{shown}: torch is built without NCCL"
        return fail(name, value, "Install torch from pytorch.org, not a build without it.")
    hidden = f", CUDA_VISIBLE_DEVICES={visible}" if visible else ""
    return ok(name, f"{shown}, NCCL {torch['nccl']}{hidden}")


def supports_bf16(torch: Mapping[str, Any]) -> bool:
    """Return whether all GPUs that torch sees compute in bfloat16."""
    return all(major >= BF16_CAPABILITY for major, _ in torch.get("capabilities", []))
