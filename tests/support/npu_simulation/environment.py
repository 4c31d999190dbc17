"""The environment of a process with simulated NPUs, for an interpreter with torch_npu."""

import os
from pathlib import Path

from tests.support.npu_simulation.libraries import build

ROOT = Path(__file__).resolve().parents[3]
SITE = Path(__file__).parent / "site"
BUILT = ROOT / "build" / "npu_simulation"


def simulated_environment(devices: int = 8, name: str = "Ascend910B1") -> dict[str, str]:
    """Build the libraries; return the environment of a process on a simulated host.

    Args:
        devices: The number of NPUs.
        name: The name that each reports.
    """

    def before(variable: str, *folders: Path) -> str:
        there = [
            part
            for part in os.environ.get(variable, "").split(os.pathsep)
            if part and part not in map(str, folders)
        ]
        return os.pathsep.join([*map(str, folders), *there])

    return {
        # Otherwise torch_npu's copies wait in a queue while kernels, Python here, already read.
        "TASK_QUEUE_ENABLE": "0",
        "SIMULATED_NPUS": str(devices),
        "SIMULATED_NPU_NAME": name,
        "LD_LIBRARY_PATH": before("LD_LIBRARY_PATH", build(BUILT)),
        "PYTHONPATH": before("PYTHONPATH", SITE, ROOT),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
