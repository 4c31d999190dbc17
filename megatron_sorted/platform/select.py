"""Chooses the platform of this process. A new device adds a module and a line here."""

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
    """What a run says about its device; ``Settings`` does."""

    device: str
    npu_adaptor: str
    npu_adaptor_arguments: str
    npu_kernels: tuple[str, ...]
    npu_coalesced_collectives: bool


def device_for(device: str) -> str:
    """Return ``device``, or for "auto" the kind of accelerator present, else cpu.

    Raises:
        PlatformError: There are two kinds.
    """
    if device != "auto":
        return device
    if is_started():
        return "npu"  # which answers for CUDA too
    gpus, npus = torch.cuda.is_available(), has_npus()
    if gpus and npus:
        raise PlatformError(
            "--device auto: this host has NVIDIA GPUs and Ascend NPUs. Say which with --device cuda or --device npu."
        )
    return "cuda" if gpus else "npu" if npus else "cpu"


def load_device(choice: DeviceChoice) -> None:
    """Load what the device of a run needs, before Megatron is imported; on cpu leaves out what is never used there, on cuda does nothing.

    Raises:
        PlatformError: It is not there.
    """
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
    """Import what torch needs beside itself for ``device``, or for the device that "auto" means here; nothing for cpu and cuda.

    Raises:
        PlatformError: It is not there, or the host has two kinds of devices.
    """
    if device_for(device) == "npu":
        load_torch_npu()


def choose_platform(device: str) -> Platform:
    """Return the platform named ``device``, or for "auto" the accelerator present, else cpu.

    Raises:
        PlatformError: If there is no such platform.
    """
    device = device_for(device)
    if device not in PLATFORMS:
        raise PlatformError(
            f"--device {device}: no such platform. Use one of: auto, {', '.join(PLATFORMS)}."
        )
    return PLATFORMS[device]()
