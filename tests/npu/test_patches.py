"""Each patch is needed: without it a training step with a save fails as its reason states."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sorted.platform.npu.patches import PATCHES

pytestmark = pytest.mark.npu
FAILURES = {
    "device names": "Torch not compiled with CUDA enabled",
    "type names": "Received torch.npu.FloatTensor",
    "capability": "'NoneType' object is not subscriptable",
    "float64 sums": "c10d::allreduce_ does not take float64",
}


def run_without(folder: Path, *patches: str) -> subprocess.CompletedProcess:
    """Return the finished process of a step without ``patches``."""
    return subprocess.run(
        [sys.executable, "-m", "tests.npu.run_without", str(folder), *patches],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_all_mends_together_train_and_save(tmp_path):
    done = run_without(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"patches {len(PATCHES)}" in done.stdout and "losses {1:" in done.stdout


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_is_needed(patch, tmp_path):
    done = run_without(tmp_path, patch.name)
    assert done.returncode != 0, f"{patch.name} is not needed any more: take it out"
    assert FAILURES[patch.name] in done.stderr, done.stdout + done.stderr
    assert patch.reason and FAILURES.keys() == {one.name for one in PATCHES}
