"""Refusals before torch_npu is loaded, and the choice of "auto".

These tests run without torch_npu, which `make test-npu` has.
"""

import importlib.util
import os

import pytest
import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform import select
from megatron_sorted.platform.kernels import FusedKernels, fused_kernels
from megatron_sorted.platform.npu import adaptors
from megatron_sorted.platform.npu import start as npu_start
from megatron_sorted.platform.npu.adaptors import ADAPTORS, BRANCHES, branch_for, load_adaptor
from megatron_sorted.platform.npu.kernels import KERNELS, chosen_kernels
from megatron_sorted.platform.npu.patches import PATCHES
from megatron_sorted.platform.npu.start import load_torch_npu
from megatron_sorted.platform.supported import MEGATRON_CORE_TESTED
from tests.npu.versions import versions
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


def test_patches_change_nothing_where_an_adaptor_did_the_same(monkeypatch):
    patches = {patch.name: patch for patch in PATCHES}
    monkeypatch.setenv("TORCH_NPU_DEVICE_CAPABILITY", "9.0")
    patches["capability"].apply()
    assert os.environ["TORCH_NPU_DEVICE_CAPABILITY"] == "9.0"

    def of_adaptor(self, dtype=None):
        return "torch.cuda.FloatTensor" if dtype is None else self.to(dtype)

    monkeypatch.setattr(torch.Tensor, "type", of_adaptor)
    patches["type names"].apply()
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.int32).dtype == torch.int32


GETS = {
    (
        "mindspeed",
        "0.16.1",
    ): "MindSpeed, branch core_r0.16.0, which is for the megatron-core 0.16.1",
    ("mindspeed", "0.17.1"): "branch core_r0.17.0, which is for the megatron-core 0.17.1 that is "
    "installed, and pip install it, after the same branch of MegatronAdaptor",
    ("mindspeed", "0.18.2+b2ce926"): "branch core_r0.18.0, which is for the megatron-core 0.18.2 ",
    ("mindspeed", "0.19.2"): "MindSpeed has no branch yet for the megatron-core 0.19.2 that is "
    "installed; the newest is core_r0.18.0: install megatron-core 0.18 and that branch",
    ("megatron_adaptor", "0.16.1"): "MegatronAdaptor begins with megatron-core 0.17 (branch "
    "core_r0.17.0), and 0.16.1 is installed: use --npu-adaptor mindspeed",
    (
        "megatron_adaptor",
        "0.17.1",
    ): "clone gitcode.com/Ascend/MegatronAdaptor, branch core_r0.17.0,",
    (
        "megatron_adaptor",
        "0.18.2",
    ): "clone gitcode.com/Ascend/MegatronAdaptor, branch core_r0.18.0,",
    (
        "megatron_adaptor",
        "0.19.2",
    ): "MegatronAdaptor has no branch yet for the megatron-core 0.19.2",
}


@pytest.mark.parametrize(("name", "version"), GETS, ids=map(" ".join, GETS))
def test_a_missing_adaptor_is_named_with_the_branch_for_the_installed_megatron(
    name, version, monkeypatch
):
    monkeypatch.setattr(adaptors, "megatron_version", lambda: version)
    with pytest.raises(PlatformError) as refusal:
        load_adaptor(name, "")
    message = str(refusal.value)
    assert message.startswith(f"--npu-adaptor {name}: {ADAPTORS[name].title} is not installed. ")
    assert GETS[name, version] in message and message.endswith(", or leave --npu-adaptor out.")


@pytest.mark.parametrize("name", ADAPTORS)
def test_what_an_adaptor_lacks_is_named(name, tmp_path, monkeypatch):
    """Check the messages for a missing package, and for TENPU, which is not one to install."""
    package, _, module = ADAPTORS[name].module.partition(".")
    place = tmp_path / package / f"{module or '__init__'}.py"
    place.parent.mkdir()
    (place.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for missing, remedy in (
        ("triton", "Install what it needs"),
        (
            "transformer_engine.x",
            "TransformerEngineNPU, with which this program has not been tried",
        ),
    ):
        place.write_text(f"raise ModuleNotFoundError('No module named x', name={missing!r})\n")
        importlib.invalidate_caches()
        with pytest.raises(
            PlatformError, match=f"--npu-adaptor {name}: No module named x."
        ) as refusal:
            load_adaptor(name, "")
        assert remedy in str(refusal.value)


def test_every_tested_megatron_but_the_newest_has_a_branch():
    minors = [".".join(version.split(".")[:2]) for version in MEGATRON_CORE_TESTED]
    assert [minor for minor in minors if minor not in BRANCHES] == minors[-1:]
    assert branch_for(ADAPTORS["mindspeed"], MEGATRON_CORE_TESTED[-1]) is None
    assert versions() == ["0.16.1", "0.18.2"]
