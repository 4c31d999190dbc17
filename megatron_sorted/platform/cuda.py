"""NVIDIA GPUs with nccl: Megatron-core's home; nothing has to be redirected."""

import importlib.util
import os

import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.peaks import peak_tflops_of


class CudaPlatform(Platform):
    """One GPU a process."""

    name = "cuda"
    backend = "nccl"
    loss_chunk_tokens = 2048

    def prepare(self) -> None:
        """Checks that torch sees a GPU.

        One connection keeps kernels in the order they were launched, on which Megatron's overlap of communication with matrix
        products in tensor and sequence parallel layers relies; it must be set before the device is first used.
        """
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if not torch.cuda.is_available():
            raise PlatformError("--device cuda: torch sees no GPU on this host. Install a CUDA build of torch, or use --device cpu.")

    def device(self) -> torch.device:
        """Returns the GPU this process is bound to."""
        return torch.device("cuda", torch.cuda.current_device())

    def select_device(self, local_rank: int) -> None:
        """Binds this process to GPU ``local_rank``."""
        if local_rank >= torch.cuda.device_count():
            raise PlatformError(
                f"local rank {local_rank}: this host has {torch.cuda.device_count()} GPUs. "
                "Start at most as many processes per host (--nproc-per-node) as it has GPUs."
            )
        torch.cuda.set_device(local_rank)

    def synchronize(self) -> None:
        """Waits for the GPU."""
        torch.cuda.synchronize()

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Returns page-locked memory."""
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a copy on the GPU, made from pinned memory: from pageable memory the driver may wait for the stream."""
        return tensor.pin_memory().to(self.device(), non_blocking=True)

    def peak_tflops(self, dtype: torch.dtype) -> float | None:
        """Returns the GPU's published peak, by its name."""
        return peak_tflops_of(torch.cuda.get_device_name(), dtype)

    def reset_peak_memory(self) -> None:
        """Resets torch's record of peak memory."""
        torch.cuda.reset_peak_memory_stats()

    def peak_memory_bytes(self) -> int:
        """Returns the peak of memory allocated by torch on this GPU."""
        return torch.cuda.max_memory_allocated()

    def has_transformer_engine(self) -> bool:
        """Returns whether Transformer Engine is installed."""
        return importlib.util.find_spec("transformer_engine") is not None

    def can_deallocate_pipeline_outputs(self) -> bool:
        """nccl's stream order makes early freeing safe."""
        return True
