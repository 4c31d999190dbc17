"""The choice of this process's platform. A new device needs a module and a line here."""

import os
from typing import Protocol

import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.cpu import CpuPlatform, keep_unused_out
from megatron_sorted.platform.cuda import CudaPlatform
from megatron_sorted.platform.npu.device import NpuPlatform
from megatron_sorted.platform.npu.start import has_npus, is_started, load_torch_npu, start_npu

PLATFORMS: dict[str, type[Platform]] = {
    "cpu": CpuPlatform,
    "cuda": CudaPlatform,
    "npu": NpuPlatform,
}


class DeviceChoice(Protocol):
    """The settings of a run's device; ``Settings`` has them."""

    device: str
    npu_adaptor: str
    npu_adaptor_arguments: str
    npu_kernels: tuple[str, ...]
    npu_coalesced_collectives: bool


def device_for(device: str) -> str:
    """Return ``device``, or for "auto" the kind of accelerator present, else cpu.

    Raises:
        PlatformError: Two kinds are present.
    """
    if device != "auto":
        return device
    if is_started():
        return "npu"  # under its patches torch.cuda is available too
    gpus, npus = torch.cuda.is_available(), has_npus()
    if gpus and npus:
        raise PlatformError(
            "--device auto: this host has NVIDIA GPUs and Ascend NPUs. "
            "Choose with --device cuda or --device npu."
        )
    return "cuda" if gpus else "npu" if npus else "cpu"


def load_device(choice: DeviceChoice) -> None:
    """Load the packages of a run's device, before Megatron is imported.

    On cpu it only keeps unused packages out; on cuda it does nothing.

    Raises:
        PlatformError: A package or the device is missing.
    """
    # Megatron would run git in its own folder on every rank, and call the commit of whatever
    # repository that lies in a part of its version.
    os.environ.setdefault("NO_VCS_VERSION", "1")
    device = device_for(choice.device)
    if device == "cpu":
        keep_unused_out()
    if device == "npu":
        NpuPlatform.use_kernels(choice.npu_kernels)
        start_npu(
            choice.npu_adaptor,
            choice.npu_adaptor_arguments,
            coalesced_collectives=choice.npu_coalesced_collectives,
        )


def load_library_of(device: str) -> None:
    """Import the package that torch needs for ``device`` or "auto"; none for cpu and cuda.

    Raises:
        PlatformError: The package is missing, or "auto" finds two kinds of devices.
    """
    if device_for(device) == "npu":
        load_torch_npu()


def choose_platform(device: str) -> Platform:
    """Return the platform named ``device``, or for "auto" the accelerator present, else cpu.

    Raises:
        PlatformError: There is no such platform.
    """
    device = device_for(device)
    if device not in PLATFORMS:
        raise PlatformError(
            f"--device {device}: no such platform. Use one of: auto, {', '.join(PLATFORMS)}."
        )
    return PLATFORMS[device]()
