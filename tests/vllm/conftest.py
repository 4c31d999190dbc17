"""Tests inside vLLM: ``make test-vllm`` runs them in an environment of their own.

In a session without vLLM, or with other tests (a bare ``pytest``), they are skipped; VLLM_TESTS_ON
requests them, and then a missing package is an error. The engine stays in this process, so one
start of vLLM serves many engines.
"""

import importlib.util
import os
from pathlib import Path

import pytest

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
    requested = [
        Path(config.invocation_params.dir, word.split("::")[0]).resolve() for word in config.args
    ]
    reason = None
    if importlib.util.find_spec("vllm") is None:
        reason = "vLLM is not installed here: make test-vllm installs it, and runs them"
    elif not all(path.is_relative_to(HERE) for path in requested):
        reason = "they need a session of their own: make test-vllm runs them"
    if reason and "VLLM_TESTS_ON" in os.environ:
        raise pytest.UsageError(f"VLLM_TESTS_ON asks for tests/vllm: {reason}")
    return reason


def pytest_configure(config: pytest.Config) -> None:
    """Set what vLLM reads when it is imported."""
    if why_not(config) is None:
        os.environ.update(ENVIRONMENT)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of this folder as skipped if they cannot run."""
    reason = why_not(config)
    for item in items if reason else ():
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=reason))
