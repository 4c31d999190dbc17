"""Fused operations of the device.

A platform that has some installs them in ``prepare``; the model uses those installed, whatever the
device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FusedKernels:
    """Operations that the device computes in one kernel; None for those left to torch.

    Attributes:
        rms_norm: (input, weight, epsilon) -> the input divided by its root mean square over the
            last dimension, times weight.
        swiglu: (input [..., 2f]) -> silu of the first half of the last dimension times the second,
            [..., f].
        rotary: (input [s, b, n, d], angles [s, 1, 1, d]) -> the rotated input, halves paired as in
            Megatron.
        attention: (query [s, b, n, d], key and value [s, b, g, d], mask, scale) -> [s, b, n*d];
            the mask is that of ``SdpaAttention``.
    """

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None
    swiglu: Callable[[torch.Tensor], torch.Tensor] | None = None
    rotary: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    attention: Callable[..., torch.Tensor] | None = None


_installed = FusedKernels()


def fused_kernels() -> FusedKernels:
    """Return the operations that the platform of this process installed."""
    return _installed


def install_kernels(kernels: FusedKernels) -> None:
    """Install ``kernels`` for the model."""
    global _installed
    _installed = kernels
