"""Chooses the platform of this process. A new device adds a module and a line here."""

import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.cpu import CpuPlatform
from megatron_sorted.platform.cuda import CudaPlatform

PLATFORMS: dict[str, type[Platform]] = {"cpu": CpuPlatform, "cuda": CudaPlatform}


def choose_platform(device: str) -> Platform:
    """Returns the platform named ``device``, or for "auto" the first accelerator present, else cpu.

    Raises:
        PlatformError: If there is no such platform.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in PLATFORMS:
        raise PlatformError(f"--device {device}: no such platform. Use one of: auto, {', '.join(PLATFORMS)}.")
    return PLATFORMS[device]()
