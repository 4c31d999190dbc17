"""How fast links between devices should be: published figures, and what adapters say of themselves.

Sources: data sheets of H100, H200 and A100 (half of NVLink's two-way figure); for the 910B, eight of which form a full mesh, 392 GB/s for
one NPU over seven two-way links (unverified).
"""

import re
from pathlib import Path

# pattern of a device's name, and bytes a second one way between two of a node
WITHIN_NODE = ((r"H[12]00.*(HBM|SXM)|H200(?!.*NVL)", 450e9), (r"A100.*SXM", 300e9), (r"910B", 28e9))


def expected_within_node(device: str) -> float | None:
    """Returns the bytes a second that two devices of this name and one node should move one way; None if unknown."""
    return next((speed for pattern, speed in WITHIN_NODE if re.search(pattern, device)), None)


def adapter_gigabits(root: Path) -> list[float]:
    """Returns the speed of each active InfiniBand or RoCE port of the host, in Gb/s, from the files below ``root``."""
    speeds = []
    for port in sorted(root.glob("*/ports/*")):
        try:
            state, rate = (port / "state").read_text(), (port / "rate").read_text()
        except OSError:
            continue
        if "ACTIVE" in state and (number := re.match(r"[\d.]+", rate)):
            speeds.append(float(number.group()))
    return speeds
