"""What every platform offers; the rest of the project talks to devices only through it."""

from abc import ABC, abstractmethod

import torch


class Platform(ABC):
    """One kind of device with its communication library; what it says here holds for processors, which need no waiting."""

    name: str
    backend: str
    host_backend: str = "gloo"  # communication between hosts' memories, whatever the device
    is_processor: bool = False  # whether the processor itself computes

    @abstractmethod
    def prepare(self) -> None:
        """Make Megatron-core usable on this device. Called once, before a process group or model is built."""

    @abstractmethod
    def device(self) -> torch.device:
        """Return the device this process computes on."""

    def select_device(self, local_rank: int) -> None:
        """Bind this process to the ``local_rank``-th device of its host.

        Raises:
            PlatformError: If the host has fewer devices.
        """

    def synchronize(self) -> None:
        """Wait until the device has finished all work given to it."""

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Return uninitialised host memory of a tensor's shape and dtype, into which the device can copy without waiting."""
        return torch.empty(like.shape, dtype=like.dtype, device=self.device())

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the host on the device, without making the host wait for the device."""
        return tensor.to(self.device())

    def peak_tflops(self, dtype: torch.dtype) -> float | None:
        """Return the device's published peak for dense matrix products of ``dtype``, in 10^12 operations a second; None if unknown."""
        return None

    def has_bf16(self) -> bool:
        """Return whether the device can compute in bf16."""
        return True

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start a new measurement of peak memory."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """Return the largest memory in use since the last reset: of the device, or resident memory on cpu. Unit: bytes."""

    def has_transformer_engine(self) -> bool:
        """Return whether Transformer Engine's layers, which have kernels for GPUs alone, can run on this device."""
        return False

    def can_deallocate_pipeline_outputs(self) -> bool:
        """Return whether a stage's output may be freed as soon as it was handed to the communication library.

        Gloo may still be sending: freeing an output early gave wrong numbers in the interleaved schedule. And Megatron frees an output
        by putting another tensor's data into it, which has no meaning for shapes alone.
        """
        return False
