"""lm-evaluation-harness: what is said where it is not there, and how its numbers are read."""

import sys

import pytest

from megatron_sorted.errors import PlatformError
from megatron_sorted.evaluation.harness import Harness, _metrics


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PlatformError, match=r"--tasks needs lm-evaluation-harness .* pip install lm-eval"):
        Harness(["anything"])


def test_flat_names_of_metrics():
    flat = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.25, "em,strict": 1, "em_stderr,strict": "N/A", "sample_len": 3}
    assert _metrics(flat) == {
        "acc": {"value": 0.5, "standard_error": 0.25}, "em (strict)": {"value": 1.0, "standard_error": None}}
