"""The doctor in a job on NPUs: every process uses its own device, and sums are right."""

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
    findings = {finding["name"]: finding for finding in answer["findings"]}
    assert not {"network test", "processes", "devices of processes"} & findings.keys(), findings
    assert findings["sums"]["verdict"] == "OK" and "on 2 processes" in findings["sums"]["value"]
    assert "torch_npu" in findings["same versions"]["value"]
    assert {figure["rank"] for figure in answer["network"]} == {0, 1} and not any(
        figure.get("wrong") for figure in answer["network"]
    )
