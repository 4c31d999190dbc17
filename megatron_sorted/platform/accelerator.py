"""The common base of accelerators, by torch's module of each kind of device."""

from types import ModuleType

import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.peaks import peak_tflops_of


class Accelerator(Platform):
    """A platform with one device for each process; torch has a module of its name.

    Attributes:
        kind: Plural name of such devices in messages, with the variable that may hide some.
    """

    kind: str

    @property
    def module(self) -> ModuleType:
        """Return torch's module for this kind of device."""
        return getattr(torch, self.name)

    def device(self) -> torch.device:
        """Return the device that this process is bound to."""
        return torch.device(self.name, self.module.current_device())

    def select_device(self, local_rank: int) -> None:
        """Bind this process to device ``local_rank``."""
        if local_rank >= self.module.device_count():
            raise PlatformError(
                f"local rank {local_rank}: this host has {self.module.device_count()} {self.kind}. "
                "Start at most as many processes per host (--nproc-per-node) as it has "
                f"{self.kind.split()[0]}."
            )
        self.module.set_device(local_rank)

    def synchronize(self) -> None:
        """Wait for the device."""
        self.module.synchronize()

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Allocate page-locked memory."""
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the device from page-locked memory.

        From pageable memory the driver may wait for the stream. The tensor is made contiguous
        first, because not every device's library pins a tensor that repeats its elements.
        """
        return tensor.contiguous().pin_memory().to(self.device(), non_blocking=True)

    def peak_tflops(self, dtype: torch.dtype) -> float | None:
        """Return the device's published peak, by its name."""
        return peak_tflops_of(self.module.get_device_name(), dtype)

    def reset_peak_memory(self) -> None:
        """Reset torch's record of peak memory."""
        self.module.reset_peak_memory_stats()

    def peak_memory_bytes(self) -> int:
        """Return the peak of memory allocated by torch on this device."""
        return self.module.max_memory_allocated()

    def can_deallocate_pipeline_outputs(self) -> bool:
        """Return True: messages are ordered in streams, so early freeing is safe."""
        return True
