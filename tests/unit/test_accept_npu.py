"""The verdicts of the acceptance of NPUs."""

import argparse
import importlib.metadata
import json
import math
import subprocess
import sys

import pytest

from lab import accept_npu
from megatron_sorted.platform.transformer_engine import TRIAL
from tests.support.engines import write_engine

EXPECTED = {1: [4.0, 5.0], 2: [2.0, 4.0]}


@pytest.mark.parametrize(
    ("got", "passed", "text"),
    [
        ({1: [4.0, 5.0], 2: [2.0, 4.002]}, True, "losses differ by up to 5.00e-04 (at most 0.001)"),
        ({1: [4.0, 5.0], 2: [2.0, 4.008]}, False, "losses differ by up to 2.00e-03"),
        ({1: [4.0, 5.0], 2: [2.0, math.nan]}, False, "losses differ by up to nan"),
        ({1: [math.nan, 5.0], 2: [2.0, 4.0]}, False, "losses differ by up to nan"),
        ({1: [4.0, 5.0]}, False, "1 steps were reported, not the 2 of the CPU"),
        ({1: [4.0, 5.0], 2: [2.0]}, False, "or other exits"),
    ],
)
def test_losses_of_npus_are_those_of_the_cpu(got, passed, text):
    judged, figure = accept_npu.compared(got, EXPECTED, 1e-3)
    assert judged is passed and text in figure


def test_a_loss_that_is_not_finite_fails(tmp_path):
    rows = [
        {"kind": "train", "step": step, "exits": {"1": {"loss": 4.0}, "2": {"loss": last}}}
        for step, last in ((1, 5.0), (2, None))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = accept_npu.losses(tmp_path / "metrics.jsonl")
    assert (
        got[1] == [4.0, 5.0]
        and not accept_npu.compared(got, {1: [4.0, 5.0], 2: [4.0, 5.0]}, 1e-3)[0]
    )


@pytest.mark.parametrize(
    ("torch", "torch_npu", "passed"),
    [
        ("2.13.0+cpu", "2.13.0", True),
        ("2.13.0", "2.13.0.post1", True),
        ("2.13.0", "2.12.0", False),
        (None, None, False),
    ],
)
def test_torch_and_torch_npu_must_be_there_in_one_version(torch, torch_npu, passed, monkeypatch):
    there = {"torch": torch, "torch_npu": torch_npu}

    def version(name: str) -> str:
        if there.get(name) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        accept_npu, "run", lambda arguments: subprocess.CompletedProcess(arguments, 1, "", "no")
    )
    lines = {
        name: (judged, figure) for name, judged, figure in accept_npu.versions(argparse.Namespace())
    }
    assert lines["torch and torch_npu"] == (
        passed,
        f"{torch or 'missing'} and {torch_npu or 'missing'}",
    )
    assert lines["torch_npu loads and sees NPUs"] == (False, "no")


def test_a_transformer_engine_on_an_npu_host_fails_unless_it_is_the_trial(tmp_path, monkeypatch):
    folder = write_engine(tmp_path, for_npus=True)
    monkeypatch.delenv(TRIAL, raising=False)
    monkeypatch.setattr(
        accept_npu, "run", lambda arguments: subprocess.CompletedProcess(arguments, 1, "", "no")
    )

    def judged() -> tuple[bool, str]:
        lines = accept_npu.versions(argparse.Namespace())
        return next((passed, figure) for name, passed, figure in lines if "Engine" in name)

    monkeypatch.setattr(sys, "path", [])
    assert judged() == (True, "none, as it must be")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    passed, figure = judged()
    assert not passed and "has not been tried with it" in figure
    monkeypatch.setenv(TRIAL, "1")
    assert judged() == (True, f"{folder}, in a trial")
