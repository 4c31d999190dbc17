"""Names of devices and their libraries, their versions, and the published speed of links.

Speeds: data sheets of H100, H200 and A100 (half of NVLink's two-way figure).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_sorted.doctor.devices.ascend import read_npu_host
from megatron_sorted.doctor.devices.gpu import read_gpu_host

DEVICES = ("auto", "cpu", "cuda", "npu")
PROBED = ("torch_npu", "transformer_engine")
"""Libraries that are used wherever they are installed."""
OPTIONAL = (*PROBED, "apex")
"""Libraries that torch or megatron-core import wherever they are installed."""
WITHIN_NODE = ((r"H[12]00.*(HBM|SXM)|H200(?!.*NVL)", 450e9), (r"A100.*SXM", 300e9))
"""(pattern of a device's name, bytes a second in one direction between two of a node)."""


def library_versions(installed: Mapping[str, str]) -> dict[str, str]:
    """Return the versions of ``OPTIONAL``, given those of all distributions by lower-case name."""
    spellings = [(name, spelt) for name in OPTIONAL for spelt in (name.replace("_", "-"), name)]
    return {name: installed[spelt] for name, spelt in spellings if spelt in installed}


def device_versions() -> dict[str, str]:
    """Return the versions of this host's drivers and toolkits, by name."""
    npu, gpu = read_npu_host(Path("/"), os.environ), read_gpu_host(Path("/"))
    known = {"NVIDIA driver": gpu.driver, "Ascend driver": npu.driver, "CANN": npu.cann}
    return {name: version for name, version in known.items() if version}


def expected_within_node(device: str) -> float | None:
    """Return the published bytes a second, in one direction, between two devices of a node.

    None if unknown for this name of a device.
    """
    return next((speed for pattern, speed in WITHIN_NODE if re.search(pattern, device)), None)


def adapter_gigabits(root: Path) -> list[float]:
    """Return the speed of each active InfiniBand or RoCE port in Gb/s, from files in ``root``."""
    speeds = []
    for port in sorted(root.glob("*/ports/*")):
        try:
            state, rate = (port / "state").read_text(), (port / "rate").read_text()
        except OSError:
            continue
        if "ACTIVE" in state and (number := re.match(r"[\d.]+", rate)):
            speeds.append(float(number.group()))
    return speeds
