"""The environment and the launcher of the processes that the lab starts."""

import os
import sys

from megatron_sorted.installation import ROOT


def environment() -> dict[str, str]:
    """Return the environment of a started process: one thread, and this clone in the path.

    Several processes that each use every core slow each other down, and with one thread sums keep
    one order.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def torchrun(num_processes: int) -> list[str]:
    """Return the start of a command that torchrun starts ``num_processes`` times on this host."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(num_processes)]
