"""The common base of accelerators, on a stand-in for torch's module of a host with two devices."""

from types import SimpleNamespace

import pytest
import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.cuda import CudaPlatform
from megatron_sorted.platform.npu.device import NpuPlatform


@pytest.fixture(params=[CudaPlatform, NpuPlatform])
def platform(request, monkeypatch):
    """Return a platform whose module in torch records which device it is bound to."""
    module = SimpleNamespace(
        bound=0,
        device_count=lambda: 2,
        current_device=lambda: module.bound,
        set_device=lambda index: setattr(module, "bound", index),
        get_device_name=lambda: "Ascend910B2",
        max_memory_allocated=lambda: 7,
        reset_peak_memory_stats=lambda: None,
        synchronize=lambda: None,
    )
    monkeypatch.setattr(torch, request.param.name, module, raising=False)
    return request.param()


def test_a_process_is_bound_to_an_existing_device(platform):
    platform.select_device(1)
    assert (
        platform.module.bound == 1
        and platform.peak_memory_bytes() == 7
        and platform.can_deallocate_pipeline_outputs()
    )
    with pytest.raises(
        PlatformError,
        match=r"local rank 2: this host has 2 "
        r"(GPUs|NPUs \(ASCEND_RT_VISIBLE_DEVICES may hide some\))\. "
        r"Start at most as many processes per host \(--nproc-per-node\) as it has (GPUs|NPUs)\.",
    ):
        platform.select_device(2)


def test_the_peak_is_that_of_the_name(platform):
    assert (
        platform.peak_tflops(torch.bfloat16) == 353.9
        and platform.peak_tflops(torch.float64) is None
    )
