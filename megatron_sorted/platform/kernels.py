"""Fused operations of the device, for the model to use where there are some.

A platform that has any installs them in ``prepare``; the model asks here and never for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FusedKernels:
    """What the device does in one operation; None where torch's own operations are to be used.

    Attributes:
        rms_norm: (input, weight, epsilon) -> the input divided by its root mean square over the last dimension, times weight.
        swiglu: (input [..., 2f]) -> silu of the first half of the last dimension times the second, [..., f].
        rotary: (input [s, b, n, d], angles [s, 1, 1, d]) -> the input turned, halves paired as in Megatron.
        attention: (query [s, b, n, d], key and value [s, b, g, d], mask, scale) -> [s, b, n*d]; mask as for ``SdpaAttention``.
    """

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None
    swiglu: Callable[[torch.Tensor], torch.Tensor] | None = None
    rotary: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    attention: Callable[..., torch.Tensor] | None = None


_installed = FusedKernels()


def fused_kernels() -> FusedKernels:
    """Return what the platform of this process installed."""
    return _installed


def install_kernels(kernels: FusedKernels) -> None:
    """Make ``kernels`` what the model finds from now on."""
    global _installed
    _installed = kernels
