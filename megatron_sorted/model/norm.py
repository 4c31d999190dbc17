"""Normalization with torch's own kernels, also under sequence parallelism."""

import torch
from megatron.core.transformer import TransformerConfig

from megatron_sorted.platform.kernels import fused_kernels
from megatron_sorted.platform.state import current_device


class FusedRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in one operation of the device."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized input."""
        return fused_kernels().rms_norm(x, self.weight, self.eps)


KINDS = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}


class Norm:
    """Factory of torch's RMSNorm or LayerNorm over the last dimension.

    ``config.normalization`` names one of the two. Megatron builds modules by calling classes, so
    this is a class that returns a torch module, as Megatron's own wrapper is. That wrapper refuses
    sequence parallelism, because each rank then sees only its tokens; marking the parameters is
    enough, since Megatron sums marked gradients over the tensor parallel group.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float, **_unused
    ) -> torch.nn.Module:
        """Build the norm module."""
        kind = KINDS[config.normalization]
        if kind is torch.nn.RMSNorm and fused_kernels().rms_norm is not None:
            kind = FusedRMSNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype, device=current_device())
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
