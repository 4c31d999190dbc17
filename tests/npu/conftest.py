"""Every process that these tests start uses simulated NPUs; with NPU_TESTS_ON=devices the host's.

This process computes the references on the CPU and never loads torch_npu. The environment set here
holds for all tests of a session, so in a session with other tests (a bare ``pytest``) these are
skipped. NPU_TESTS_ON requests them: then a missing package is an error.
"""

import os
import sys
from pathlib import Path

import pytest

from megatron_sorted.platform.processes import keep_device_packages_out
from tests.support import own_session, ranks
from tests.support.npu_simulation.environment import simulated_environment

HERE = Path(__file__).parent
KINDS = ("simulation", "devices")


def why_not(config: pytest.Config) -> str | None:
    """Return why these tests are left out of a session; None where they are run.

    Raises:
        UsageError: They are asked for and cannot be run.
    """
    missing = f"torch_npu is not installed for {sys.executable}"
    return own_session.why_not(config, HERE, "torch_npu", missing, "test-npu", "NPU_TESTS_ON")


def pytest_configure(config: pytest.Config) -> None:
    """Give the processes of this session NPUs, unless the tests on NPUs are skipped."""
    if why_not(config):
        return
    kind = os.environ.get("NPU_TESTS_ON", "simulation")
    if kind not in KINDS:
        raise pytest.UsageError(
            f"NPU_TESTS_ON={kind}: no such NPUs. Use one of: {', '.join(KINDS)}."
        )
    keep_device_packages_out()
    if kind == "simulation":
        os.environ.update(simulated_environment())
    ranks.FORK_SERVER.set_forkserver_preload(["tests.support.npu_preload"])
    ranks.device_context = ranks.FORK_SERVER


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of this folder as skipped if they cannot run."""
    own_session.skip_all(items, HERE, why_not(config))
