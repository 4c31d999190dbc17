"""What every platform offers; the rest of the project talks to devices only through it."""

from abc import ABC, abstractmethod

import torch


class Platform(ABC):
    """One kind of device with its communication library."""

    name: str
    backend: str
    host_backend: str = "gloo"  # communication between hosts' memories, whatever the device
    loss_chunk_tokens: int  # tokens whose logits exist at one time, unless the settings say otherwise

    @abstractmethod
    def prepare(self) -> None:
        """Makes Megatron-core usable on this device. Called once, before a process group or model is built."""

    @abstractmethod
    def device(self) -> torch.device:
        """Returns the device this process computes on."""

    @abstractmethod
    def select_device(self, local_rank: int) -> None:
        """Binds this process to the ``local_rank``-th device of its host.

        Raises:
            PlatformError: If the host has fewer devices.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until the device has finished all work given to it."""

    @abstractmethod
    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Returns uninitialised host memory of a tensor's shape and dtype, into which the device can copy without waiting."""

    @abstractmethod
    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor of the host on the device, without making the host wait for the device."""

    @abstractmethod
    def peak_tflops(self, dtype: torch.dtype) -> float | None:
        """Returns the device's published peak for dense matrix products of ``dtype``, in 10^12 operations a second; None if unknown."""

    def has_bf16(self) -> bool:
        """Returns whether the device can compute in bf16."""
        return True

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Starts a new measurement of peak memory."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """Returns the largest memory in use since the last reset: of the device, or resident memory on cpu. Unit: bytes."""

    @abstractmethod
    def has_transformer_engine(self) -> bool:
        """Returns whether Transformer Engine's layers can run on this device."""

    @abstractmethod
    def can_deallocate_pipeline_outputs(self) -> bool:
        """Returns whether a stage's output may be freed as soon as it was handed to the communication library."""
