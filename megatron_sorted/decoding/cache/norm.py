"""RMSNorm in as few operations as the device allows."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sorted.platform.fused import kernels_of


class RmsNorm:
    """The RMSNorm of transformers: one operation on GPUs and NPUs, four or five on CPUs.

    There torch's own is a composite of eight. As long as they fit into the cache, the cost of small
    tensors is the number of operations.

    Args:
        weight: Weights [..., h], which are multiplied with the normed tensor; not copied, except on
            a CPU.
        epsilon: What is added to the mean square.
    """

    def __init__(self, weight: Tensor, epsilon: float):
        self.weight, self.epsilon, self.size = weight.detach(), epsilon, weight.size(-1)
        self._fused = kernels_of(weight.device).rms_norm if weight.dim() == 1 else None
        self._on_cpu = weight.device.type == "cpu"
        if self._on_cpu:
            # x / sqrt(mean(x^2) + e) = x sqrt(h) / sqrt(|x|^2 + h e)
            self._factor = math.sqrt(self.size)
            self._wide = torch.promote_types(weight.dtype, torch.float32)
            self._least = torch.tensor(math.sqrt(self.size * epsilon), dtype=self._wide)
            self._zero = torch.zeros((), dtype=self._wide)
            self._scaled = self.weight * self._factor

    @classmethod
    def of(cls, module: nn.Module) -> "RmsNorm":
        """Return the norm of a module of transformers."""
        return cls(module.weight, module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normed tensor [..., h]."""
        if self._on_cpu:
            return self._on_host(x)
        if self._fused is not None:
            return self._fused(x, self.weight, self.epsilon)
        if self.weight.dim() == 1:
            return F.rms_norm(x, (self.size,), self.weight, self.epsilon)
        return F.rms_norm(x, (self.size,), None, self.epsilon) * self.weight

    def _on_host(self, x: Tensor) -> Tensor:
        """Return the normed tensor, rounded where transformers rounds."""
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=self._wide).hypot_(self._least)
        if x.dtype == self._wide:
            return (x / length).mul_(self._scaled)
        normed = torch.addcdiv(self._zero, x, length, value=self._factor)
        return normed.to(x.dtype).mul_(self.weight)
