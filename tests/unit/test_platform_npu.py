"""Refusals before torch_npu is loaded, and the choice of "auto".

These tests run without torch_npu, which `make test-npu` has.
"""

import importlib.util

import pytest
import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform import select
from megatron_sorted.platform.kernels import FusedKernels, fused_kernels
from megatron_sorted.platform.npu import start as npu_start
from megatron_sorted.platform.npu.kernels import KERNELS, chosen_kernels
from megatron_sorted.platform.npu.patches import PATCHES
from megatron_sorted.platform.npu.start import load_torch_npu
from tests.support.tiny import TINY


def test_gpus_and_npus_in_one_process_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        PlatformError, match=r"one kind of accelerator only\. Install a CPU build of torch"
    ):
        load_torch_npu()


@pytest.mark.parametrize(
    ("gpus", "npus", "expected"),
    [(True, False, "cuda"), (False, True, "npu"), (False, False, "cpu")],
)
def test_auto_chooses_the_accelerator_that_is_present(gpus, npus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(select, "has_npus", lambda: npus)
    assert select.device_for("auto") == expected and select.device_for("cpu") == "cpu"


def test_auto_does_not_choose_between_two(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(select, "has_npus", lambda: True)
    with pytest.raises(PlatformError, match="Choose with --device cuda or --device npu"):
        select.device_for("auto")


def test_torch_npu_without_devices_is_no_accelerator(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(npu_start, "Path", lambda name: tmp_path)
    assert not npu_start.has_npus()
    (tmp_path / "davinci_manager").touch()
    assert not npu_start.has_npus()
    (tmp_path / "davinci0").touch()
    assert npu_start.has_npus()


def test_no_fused_operation_is_used_unless_a_platform_brings_it():
    assert fused_kernels() == FusedKernels() == chosen_kernels(())
    assert (
        chosen_kernels(("swiglu",)).swiglu is KERNELS["swiglu"]
        and chosen_kernels(("swiglu",)).attention is None
    )
    assert set(TINY.npu_kernels) == set(KERNELS)


def test_every_patch_has_a_unique_name_and_a_reason():
    assert len({patch.name for patch in PATCHES}) == len(PATCHES) and all(
        len(patch.reason) > 20 for patch in PATCHES
    )
