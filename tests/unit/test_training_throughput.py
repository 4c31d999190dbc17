"""Operations and rates by hand."""

import pytest
import torch

from megatron_sorted.platform.cpu import CpuPlatform
from megatron_sorted.settings.costs import forward_flops_per_token
from megatron_sorted.training.run.throughput import (
    device_peak_tflops,
    model_flops_utilisation,
    step_flops,
    tflops_per_device,
)
from tests.support.tiny import tiny

# tiny: 4 layers, hidden 32, MLP 48 (three matrices), 4 heads of 8 channels in 2 groups, vocabulary
# 100, 8 samples of 16 tokens
HEAD = 2 * 32 * 100
LAYER = 2 * (32 * (32 + 32) + 32 * 32 + 3 * 32 * 48) + 2 * 16 * 32
TOKENS = 8 * 16


@pytest.mark.parametrize(("changes", "world_size", "depths", "layers", "heads"), [
    ({}, 1, {1: 0.5, 2: 0.1, 3: 0.1, 4: 0.3}, 4, 4),
    ({}, 2, (2,), 2, 1),  # one stage: nothing above the deepest exit that trains is run
    ({}, 2, (1, 3), 3, 2),
    ({"overlap_grad_reduce": True}, 2, (2,), 4, 1),
    ({"pipeline_model_parallel_size": 2}, 2, (2, 1), 4, 2),
    ({"recompute_granularity": "full"}, 1, (4,), 4, 1),  # recomputation is not counted
])  # fmt: skip
def test_operations_of_a_step(changes, world_size, depths, layers, heads):
    settings = tiny(**changes)
    assert forward_flops_per_token(settings, 100)[1] == LAYER + HEAD
    assert step_flops(settings, 100, world_size, depths) == TOKENS * 3 * (
        layers * LAYER + heads * HEAD
    )


def test_batch_follows_from_the_processes():
    settings = tiny(
        global_batch_size=None, tensor_model_parallel_size=2
    )  # micro-batches of 2, 4 data parallel ranks
    assert step_flops(settings, 100, 8, (4,)) == step_flops(tiny(), 100, 1, (4,))


def test_rates():
    assert tflops_per_device(6e15, 2.0, 10) == pytest.approx(300.0)
    assert (
        model_flops_utilisation(300.0, 1000.0) == pytest.approx(0.3)
        and model_flops_utilisation(300.0, None) is None
    )
    assert tflops_per_device(1.0, 0.0, 1) > 0


class Known(CpuPlatform):
    """A device that names its peak."""

    def peak_tflops(self, dtype: torch.dtype) -> float | None:
        """Return a rate for each kind that has one."""
        return {torch.bfloat16: 100.0, torch.float32: 10.0}.get(dtype)


def test_peak_is_as_given_else_as_known():
    assert device_peak_tflops(tiny(bf16=True), Known()) == 100.0
    assert device_peak_tflops(tiny(), Known()) == 10.0
    assert device_peak_tflops(tiny(fp16=True), Known()) is None
    assert device_peak_tflops(tiny(fp16=True, device_peak_tflops=7.5), Known()) == 7.5
