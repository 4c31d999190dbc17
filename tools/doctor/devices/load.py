"""Makes the devices of this host known to torch, in this process."""

from megatron_sorted.platform.npu_start import load_torch_npu
from megatron_sorted.platform.select import device_for


def load_library_of(device: str) -> None:
    """Imports what torch needs beside itself for ``device``, or for the device that "auto" means here; nothing for cpu and cuda.

    Raises:
        PlatformError: It is not there, or the host has two kinds of devices.
    """
    if device_for(device) == "npu":
        load_torch_npu()
