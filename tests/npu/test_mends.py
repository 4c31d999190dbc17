"""Each mend is needed: without it a training step with a save fails, in the way its reason says."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sorted.platform.npu.mends import MENDS

pytestmark = pytest.mark.npu
FAILURES = {
    "device names": "Torch not compiled with CUDA enabled",
    "type names": "Received torch.npu.FloatTensor",
    "capability": "'NoneType' object is not subscriptable",
    "float64 sums": "c10d::allreduce_ does not take float64",
}


def run_without(folder: Path, *mends: str) -> subprocess.CompletedProcess:
    """Returns the finished process of a step without ``mends``."""
    return subprocess.run(
        [sys.executable, "-m", "tests.npu.run_without", str(folder), *mends],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_all_mends_together_train_and_save(tmp_path):
    done = run_without(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"mends {len(MENDS)}" in done.stdout and "losses {1:" in done.stdout


@pytest.mark.parametrize("mend", MENDS, ids=lambda mend: mend.name)
def test_a_mend_is_needed(mend, tmp_path):
    done = run_without(tmp_path, mend.name)
    assert done.returncode != 0, f"{mend.name} is not needed any more: take it out"
    assert FAILURES[mend.name] in done.stderr, done.stdout + done.stderr
    assert mend.reason and FAILURES.keys() == {one.name for one in MENDS}
