"""Huawei Ascend NPUs with HCCL, through torch_npu, on unmodified megatron-core.

torch_npu's transfer_to_npu and the patches of ``patches.py`` answer Megatron's calls of CUDA.
"""

import torch

from megatron_sorted.platform.accelerator import Accelerator
from megatron_sorted.platform.kernels import install_kernels
from megatron_sorted.platform.npu.kernels import KERNELS, chosen_kernels
from megatron_sorted.platform.npu.start import start_npu


class NpuPlatform(Accelerator):
    """Ascend NPUs, one for each process."""

    name = "npu"
    backend = "hccl"
    kind = "NPUs (ASCEND_RT_VISIBLE_DEVICES may hide some)"
    _kernels: tuple[str, ...] = tuple(KERNELS)  # names of the fused operations to install

    @classmethod
    def use_kernels(cls, names: tuple[str, ...]) -> None:
        """Choose the fused operations that ``prepare`` installs."""
        cls._kernels = names

    def prepare(self) -> None:
        """Start torch_npu, unless ``select.load_device`` did, and install the fused operations."""
        start_npu()
        kernels = chosen_kernels(self._kernels)
        install_kernels(kernels)
        from megatron.core.models.common.embeddings import rope_utils

        # takes the place of Transformer Engine's; Megatron calls it if apply_rope_fusion is set
        rope_utils.fused_apply_rotary_pos_emb = kernels.rotary and (
            lambda t, freqs, interleaved: kernels.rotary(t, freqs)
        )

    def has_bf16(self) -> bool:
        """Return whether the NPU supports bf16; the first generation (910A) does not."""
        start_npu()
        return torch.npu.is_bf16_supported()
