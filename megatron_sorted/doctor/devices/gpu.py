"""NVIDIA GPUs: the driver, torch's build, and whether they go together."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine
from megatron_sorted.doctor.packages import numbers_of

# CUDA toolkit release notes: the oldest Linux driver on which programs of any minor version of a major one run
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
# compute capability from which matrix products know bfloat16
BF16_CAPABILITY = 8


@dataclass(frozen=True)
class GpuHost:
    """What the operating system says of GPUs.

    Attributes:
        driver: Version of the kernel's driver; empty without one.
        device_files: Number of /dev/nvidia0, /dev/nvidia1, ...
    """

    driver: str
    device_files: int


def read_gpu_host(root: Path) -> GpuHost:
    """Return what the files below ``root`` (of the system: /) say of GPUs."""
    version = root / "proc/driver/nvidia/version"
    text = version.read_text(errors="replace") if version.is_file() else ""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    files = [
        path for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)
    ]
    return GpuHost(found.group(1) if found else "", len(files))


def check_gpus(
    host: GpuHost, torch: Mapping[str, Any] | None, device: str, environment: Mapping[str, str]
) -> list[Finding]:
    """Return whether torch can use the GPUs of this host.

    Args:
        host: What the system has.
        torch: What torch says; None if it cannot be imported.
        device: ``--device``.
        environment: The process's environment.
    """
    present = bool(host.driver or host.device_files)
    found = []
    if present and not host.device_files:
        found.append(
            doubtful(
                "NVIDIA driver",
                f"{host.driver}, but no /dev/nvidia0",
                "Ask the scheduler for GPUs, or start the container with them (docker run --gpus all).",
            )
        )
    elif present:
        found.append(
            fine("NVIDIA driver", f"{host.driver or 'version unknown'}, {host.device_files} GPUs")
        )
    if torch is None:
        return found
    return found + _check_build(host, torch, device, environment)


def _check_build(
    host: GpuHost, torch: Mapping[str, Any], device: str, environment: Mapping[str, str]
) -> list[Finding]:
    build, devices = torch.get("cuda"), torch.get("devices", [])
    if build is None:
        if device == "cuda" or (host.device_files and device == "auto"):
            remedy = "Install a CUDA build of torch (pytorch.org/get-started), or use --device cpu."
            return [
                broken("torch on GPU", f"torch {torch['version']} is built without CUDA", remedy)
            ]
        return []
    oldest = OLDEST_DRIVER.get(numbers_of(build)[0])
    if host.driver and oldest and numbers_of(host.driver)[:2] < oldest:
        needed = ".".join(map(str, oldest))
        return [
            broken(
                "torch on GPU",
                f"driver {host.driver} is too old for CUDA {build}",
                f"Update the driver to {needed} or newer, or install torch for an older CUDA.",
            )
        ]
    if not devices:
        hidden = environment.get("CUDA_VISIBLE_DEVICES")
        why = (
            f"CUDA_VISIBLE_DEVICES is {hidden!r}"
            if hidden is not None
            else torch.get("device_error") or "torch sees no GPU"
        )
        if device == "cuda" or (host.device_files and device == "auto" and hidden is None):
            return [
                broken(
                    "torch on GPU",
                    why,
                    "Mend this, or use --device cpu; nvidia-smi says whether the driver itself works.",
                )
            ]
        return [fine("torch on GPU", f"built for CUDA {build}; no GPU to use ({why})")]
    return _check_devices(torch, devices, build, environment)


def _check_devices(
    torch: Mapping[str, Any], devices: list[str], build: str, environment: Mapping[str, str]
) -> list[Finding]:
    shown = (
        f"{len(devices)} x {devices[0]}, CUDA {build}, NCCL {torch.get('nccl_version', 'missing')}"
    )
    architectures = torch.get("architectures", [])
    unknown = [
        f"{devices[i]} ({major}.{minor})"
        for i, (major, minor) in enumerate(torch.get("capabilities", []))
        if architectures and not _has_code_for(architectures, major, minor)
    ]
    if unknown:
        return [
            broken(
                "torch on GPU",
                f"torch {torch['version']} has no code for {', '.join(unknown)}",
                f"Install a build of torch for it; this one has {', '.join(torch['architectures'])}.",
            )
        ]
    if torch.get("device_error"):
        return [
            broken(
                "torch on GPU",
                f"{devices[0]}: {torch['device_error']}",
                "nvidia-smi shows who uses it and whether it is in order.",
            )
        ]
    if not torch.get("nccl", True):
        return [
            broken(
                "torch on GPU",
                f"{shown}: torch is built without NCCL",
                "Install torch from pytorch.org, not a build without it.",
            )
        ]
    if len(set(devices)) > 1:
        return [
            doubtful(
                "torch on GPU",
                f"different devices: {', '.join(sorted(set(devices)))}",
                "The slowest sets the pace; choose equal ones by CUDA_VISIBLE_DEVICES.",
            )
        ]
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    return [fine("torch on GPU", shown + (f", CUDA_VISIBLE_DEVICES={hidden}" if hidden else ""))]


def _has_code_for(architectures: list[str], major: int, minor: int) -> bool:
    """Return whether a build has code for a compute capability: a binary for 8.0 runs on 8.0 to 8.9, "compute_80" on all that is newer."""
    for name in architectures:
        kind, digits = name.rstrip("af").split("_")
        have = (int(digits[:-1]), int(digits[-1]))
        if have <= (major, minor) and (kind == "compute" or have[0] == major):
            return True
    return False


def knows_bf16(torch: Mapping[str, Any]) -> bool:
    """Return whether all GPUs that torch sees compute in bfloat16."""
    return all(major >= BF16_CAPABILITY for major, _ in torch.get("capabilities", []))
