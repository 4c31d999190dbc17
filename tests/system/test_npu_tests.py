"""Without torch_npu, tests/npu is skipped with a reason; if it is requested, that is an error."""

import subprocess
import sys

import pytest

from tests.support.npu_simulation.environment import ROOT

# whatever this interpreter has
WITHOUT_TORCH_NPU = (
    "import sys; sys.modules['torch_npu'] = None; "
    "import pytest; raise SystemExit(pytest.main(sys.argv[1:]))"
)


def pytest_of(folder_or_file: str) -> subprocess.CompletedProcess:
    """Return the finished session."""
    command = [
        sys.executable,
        "-c",
        WITHOUT_TORCH_NPU,
        "-rsp",
        "-p",
        "no:cacheprovider",
        folder_or_file,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_torch_npu_tests_are_skipped_with_a_reason(monkeypatch):
    monkeypatch.delenv("NPU_TESTS_ON", raising=False)
    done = pytest_of("tests/npu/test_patches.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "torch_npu is not installed for" in done.stdout
        and "make test-npu installs it" in done.stdout
    )
    assert "PASSED" not in done.stdout


@pytest.mark.parametrize("kind", ["simulation", "devices"])
def test_requested_tests_are_never_skipped(kind, monkeypatch):
    monkeypatch.setenv("NPU_TESTS_ON", kind)
    done = pytest_of("tests/npu")
    assert done.returncode != 0, done.stdout
    assert "NPU_TESTS_ON asks for tests/npu: torch_npu is not installed for" in done.stderr


def test_make_test_npu_requests_them(monkeypatch):
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of the make that runs this test
        monkeypatch.delenv(name, raising=False)
    output = subprocess.run(
        ["make", "-n", "test-npu"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "NPU_TESTS_ON=simulation" in output and 'pytest -m "not long" tests/npu ||' in output
