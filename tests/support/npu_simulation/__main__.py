"""Run a command on a simulated Ascend host.

python -m tests.support.npu_simulation python -m lab.accept_npu
"""

import os
import sys

from tests.support.npu_simulation.environment import simulated_environment

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    os.environ.update(simulated_environment())
    os.execvp(sys.argv[1], sys.argv[1:])
