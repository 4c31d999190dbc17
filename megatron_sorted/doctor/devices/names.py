"""Names of devices and of the libraries for them, the versions of what stands below those, and how fast links should be.

Sources of speeds: data sheets of H100, H200 and A100 (half of NVLink's two-way figure); for the 910B, eight of which form a full mesh,
392 GB/s for one NPU over seven two-way links (unverified).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_sorted.doctor.devices.ascend import read_npu_host
from megatron_sorted.doctor.devices.gpu import read_gpu_host

DEVICES = ("auto", "cpu", "cuda", "npu")
OPTIONAL = ("torch_npu", "transformer_engine", "apex")
"""Libraries that are imported where they are installed, wanted or not."""
# pattern of a device's name, and bytes a second one way between two of a node
WITHIN_NODE = ((r"H[12]00.*(HBM|SXM)|H200(?!.*NVL)", 450e9), (r"A100.*SXM", 300e9), (r"910B", 28e9))


def library_versions(installed: Mapping[str, str]) -> dict[str, str]:
    """Return the versions of the libraries for devices, of all installed distributions by name in small letters."""
    names = {
        "torch_npu": ("torch-npu", "torch_npu"),
        "transformer_engine": ("transformer-engine", "transformer_engine"),
        "apex": ("apex",),
    }
    return {
        name: installed[spelt]
        for name, spellings in names.items()
        for spelt in spellings
        if spelt in installed
    }


def device_versions() -> dict[str, str]:
    """Return the versions of drivers and toolkits that this host has, by name, as the system's files say."""
    npu, gpu = read_npu_host(Path("/"), os.environ), read_gpu_host(Path("/"))
    known = {"NVIDIA driver": gpu.driver, "Ascend driver": npu.driver, "CANN": npu.cann}
    return {name: version for name, version in known.items() if version}


def expected_within_node(device: str) -> float | None:
    """Return the bytes a second that two devices of this name and one node should move one way; None if unknown."""
    return next((speed for pattern, speed in WITHIN_NODE if re.search(pattern, device)), None)


def adapter_gigabits(root: Path) -> list[float]:
    """Return the speed of each active InfiniBand or RoCE port of the host, in Gb/s, from the files below ``root``."""
    speeds = []
    for port in sorted(root.glob("*/ports/*")):
        try:
            state, rate = (port / "state").read_text(), (port / "rate").read_text()
        except OSError:
            continue
        if "ACTIVE" in state and (number := re.match(r"[\d.]+", rate)):
            speeds.append(float(number.group()))
    return speeds
