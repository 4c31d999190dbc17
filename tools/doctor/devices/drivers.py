"""Versions of what stands below torch on this host: driver and toolkit, as the system's files say."""

import os
from pathlib import Path

from doctor.devices.ascend import read_npu_host
from doctor.devices.gpu import read_gpu_host


def device_versions() -> dict[str, str]:
    """Returns the versions of drivers and toolkits of this host's accelerators, by name; those it does not have are left out."""
    npu, gpu = read_npu_host(Path("/"), os.environ), read_gpu_host(Path("/"))
    known = {"NVIDIA driver": gpu.driver, "Ascend driver": npu.driver, "CANN": npu.cann}
    return {name: version for name, version in known.items() if version}
