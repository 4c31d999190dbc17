"""The interface of every platform, through which alone the rest of the project uses devices."""

from abc import ABC, abstractmethod

import torch


class Platform(ABC):
    """One kind of device with its communication library.

    The defaults here are right for CPUs, which work synchronously.

    Attributes:
        name: Name of the device in settings, such as "cuda".
        backend: Communication backend of torch.distributed for the device's memory.
        host_backend: Communication backend for host memory.
        is_processor: Whether the CPU itself computes.
    """

    name: str
    backend: str
    host_backend: str = "gloo"
    is_processor: bool = False

    @abstractmethod
    def prepare(self) -> None:
        """Make Megatron-core usable on this device.

        Called once, before a process group or a model is created.
        """

    @abstractmethod
    def device(self) -> torch.device:
        """Return the device that this process computes on."""

    def select_device(self, local_rank: int) -> None:
        """Bind this process to the ``local_rank``-th device of its host.

        Raises:
            PlatformError: The host has fewer devices.
        """

    def synchronize(self) -> None:
        """Wait until the device has finished all work queued on it."""

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Allocate host memory of a tensor's shape and dtype, for asynchronous copies."""
        return torch.empty(like.shape, dtype=like.dtype, device=self.device())

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor from the host to the device, without making the host wait."""
        return tensor.to(self.device())

    def peak_tflops(self, dtype: torch.dtype) -> float | None:
        """Return the device's published peak for dense matrix products of ``dtype``.

        The unit is 10^12 operations a second; None if the peak is unknown.
        """
        return None

    def has_bf16(self) -> bool:
        """Return whether the device can compute in bf16."""
        return True

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start a new measurement of peak memory."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """Return the peak of used memory since the last reset, in bytes.

        It is the device's memory, or on a CPU resident memory.
        """

    def has_transformer_engine(self) -> bool:
        """Return whether Transformer Engine's layers, which need NVIDIA GPUs, can run here."""
        return False

    def can_deallocate_pipeline_outputs(self) -> bool:
        """Return whether a stage's output may be freed as soon as its sending has begun.

        Gloo may still be reading it: freeing an output early gave wrong numbers in the interleaved
        schedule. And Megatron frees an output by replacing its data, which is meaningless on the
        meta device.
        """
        return False
