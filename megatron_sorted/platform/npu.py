"""Huawei Ascend NPUs with HCCL, through torch_npu, on unmodified megatron-core.

What Megatron says of CUDA is answered by torch_npu's transfer_to_npu and the mends of ``npu_mends.py``.
"""

import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.kernels import install_kernels
from megatron_sorted.platform.npu_kernels import KERNELS, chosen_kernels
from megatron_sorted.platform.npu_start import start_npu
from megatron_sorted.platform.peaks import peak_tflops_of


class NpuPlatform(Platform):
    """One NPU a process."""

    name = "npu"
    backend = "hccl"
    loss_chunk_tokens = 2048
    _kernels: tuple[str, ...] = tuple(KERNELS)  # names of the fused operations that the model is to use

    @classmethod
    def use_kernels(cls, names: tuple[str, ...]) -> None:
        """Chooses the fused operations that ``prepare`` installs."""
        cls._kernels = names

    def prepare(self) -> None:
        """Starts torch_npu, if ``select.load_device`` did not, and gives model and Megatron the fused operations."""
        start_npu()
        kernels = chosen_kernels(self._kernels)
        install_kernels(kernels)
        from megatron.core.models.common.embeddings import rope_utils

        # Megatron's door for Transformer Engine's operation, used where its configuration says apply_rope_fusion
        rope_utils.fused_apply_rotary_pos_emb = kernels.rotary and (lambda t, freqs, interleaved: kernels.rotary(t, freqs))

    def device(self) -> torch.device:
        """Returns the NPU this process is bound to."""
        return torch.device("npu", torch.npu.current_device())

    def select_device(self, local_rank: int) -> None:
        """Binds this process to NPU ``local_rank``."""
        if local_rank >= torch.npu.device_count():
            raise PlatformError(
                f"local rank {local_rank}: this host has {torch.npu.device_count()} NPUs (ASCEND_RT_VISIBLE_DEVICES may hide some). "
                "Start at most as many processes per host (--nproc-per-node) as it has NPUs.")
        torch.npu.set_device(local_rank)

    def synchronize(self) -> None:
        """Waits for the NPU."""
        torch.npu.synchronize()

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Returns page-locked memory."""
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a copy on the NPU, made from page-locked memory; torch_npu does not pin a tensor that repeats its elements."""
        return tensor.contiguous().pin_memory().to(self.device(), non_blocking=True)

    def peak_tflops(self, dtype: torch.dtype) -> float | None:
        """Returns the NPU's published peak, by its name."""
        return peak_tflops_of(torch.npu.get_device_name(), dtype)

    def has_bf16(self) -> bool:
        """Returns whether the NPU knows bf16: the first generation (910A) does not."""
        start_npu()
        return torch.npu.is_bf16_supported()

    def reset_peak_memory(self) -> None:
        """Resets torch's record of peak memory."""
        torch.npu.reset_peak_memory_stats()

    def peak_memory_bytes(self) -> int:
        """Returns the peak of memory allocated by torch on this NPU."""
        return torch.npu.max_memory_allocated()

    def has_transformer_engine(self) -> bool:
        """Transformer Engine is NVIDIA's; what MindSpeed gives out under its name has no layers."""
        return False

    def can_deallocate_pipeline_outputs(self) -> bool:
        """HCCL's messages are ordered in streams as nccl's are, so early freeing is safe."""
        return True
