"""Fused operations of a device, for programs that run without a platform."""

import torch

from megatron_sorted.platform.kernels import FusedKernels


def kernels_of(device: torch.device) -> FusedKernels:
    """Return the fused operations of a device, which are none but on NPUs."""
    if device.type != "npu":
        return FusedKernels()
    from megatron_sorted.platform.npu.kernels import KERNELS

    return FusedKernels(**KERNELS)
