"""NVIDIA GPUs with nccl, for which Megatron-core is written: nothing is redirected."""

import os

import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.accelerator import Accelerator
from megatron_sorted.platform.transformer_engine import has_nvidia_engine


class CudaPlatform(Accelerator):
    """NVIDIA GPUs, one for each process."""

    name = "cuda"
    backend = "nccl"
    kind = "GPUs"

    def prepare(self) -> None:
        """Check that torch sees a GPU.

        A single hardware queue keeps kernels in the order of their launches. Megatron relies on it
        to overlap communication with matrix products in tensor and sequence parallel layers. It
        must be set before the device is first used.
        """
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if not torch.cuda.is_available():
            raise PlatformError(
                "--device cuda: torch sees no GPU on this host. "
                "Install a CUDA build of torch, or use --device cpu."
            )

    def has_transformer_engine(self) -> bool:
        """Return whether Transformer Engine is installed, NVIDIA's and not the one for NPUs."""
        return has_nvidia_engine(self.name)
