"""Every process that these tests start meets simulated NPUs; with NPU_TESTS_ON=devices it meets the host's.

This process itself computes the references, on the CPU: it never loads torch_npu.
"""

import os

from megatron_sorted.platform.before_torch import keep_device_packages_out
from tests.support import ranks
from tests.support.npu_simulation.environment import simulated_environment

keep_device_packages_out()
if os.environ.get("NPU_TESTS_ON", "simulation") == "simulation":
    os.environ.update(simulated_environment())
ranks.FORK_SERVER.set_forkserver_preload(["tests.support.npu_preload"])
ranks.device_context = ranks.FORK_SERVER
