"""Tests inside vLLM: ``make test-vllm`` runs them in an environment of their own.

In a session without vLLM, or with other tests (a bare ``pytest``), they are skipped; VLLM_TESTS_ON
requests them, and then a missing package is an error. The engine stays in this process, so one
start of vLLM serves many engines.
"""

import os
from pathlib import Path

import pytest

from tests.support import own_session

HERE = Path(__file__).parent
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "900",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def why_not(config: pytest.Config) -> str | None:
    """Return why these tests are left out of a session; None where they are run.

    Raises:
        UsageError: They are asked for and cannot be run.
    """
    missing = "vLLM is not installed here"
    return own_session.why_not(config, HERE, "vllm", missing, "test-vllm", "VLLM_TESTS_ON")


def pytest_configure(config: pytest.Config) -> None:
    """Set what vLLM reads when it is imported."""
    if why_not(config) is None:
        os.environ.update(ENVIRONMENT)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of this folder as skipped if they cannot run."""
    own_session.skip_all(items, HERE, why_not(config))
