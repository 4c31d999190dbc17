"""The doctor in a job on NPUs: every process finds its own, they talk through the devices' library, and sums are right."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.npu_simulation.environment import ROOT

pytestmark = pytest.mark.npu


def test_a_job_on_two_npus_is_measured(tmp_path):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    doctor = [
        ROOT / "tools" / "doctor.py",
        "--json",
        "--device",
        "npu",
        "--folder",
        tmp_path,
        "--limit-seconds",
        "200",
    ]
    done = subprocess.run(
        [*launcher, *doctor],
        env=dict(os.environ),
        text=True,
        capture_output=True,
        timeout=500,
        check=False,
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    answer = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in answer["findings"]}
    assert not {"network test", "processes", "devices of processes"} & found.keys(), found
    assert found["sums"]["verdict"] == "OK" and "on 2 processes" in found["sums"]["value"]
    assert "torch_npu" in found["same versions"]["value"]
    assert {figure["rank"] for figure in answer["network"]} == {0, 1} and not any(
        figure.get("wrong") for figure in answer["network"]
    )
