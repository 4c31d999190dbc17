"""Fused operations through the project's modules: output and gradients equal torch on the CPU."""

import pytest
import torch
from torch.nn import functional as F

from tests.support.ranks import run_ranks
from tests.support.tiny import tiny

pytestmark = pytest.mark.npu
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(case: dict, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Return what torch's own operations make of the inputs, in fp32."""
    if case["kind"] == "norm":
        return F.rms_norm(inputs[0], (inputs[0].size(-1),), inputs[1], 1e-5)
    if case["kind"] == "swiglu":
        gate, up = inputs[0].chunk(2, -1)
        return F.silu(gate) * up
    if case["kind"] == "rotary":
        angles, size = case["angles"], case["angles"].size(-1)
        x, rest = inputs[0][..., :size], inputs[0][..., size:]
        half = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), -1)
        return torch.cat((x * angles.cos() + half * angles.sin(), rest), -1)
    query, key, value = (x.permute(1, 2, 0, 3) for x in inputs)
    mask = case.get("mask")
    length = query.size(2)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1) if mask is None else mask.isinf()
    times = query.size(1) // key.size(1)
    scores = query @ key.repeat_interleave(times, 1).transpose(-1, -2) * query.size(-1) ** -0.5
    out = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value.repeat_interleave(times, 1)
    return out.permute(2, 0, 1, 3).flatten(-2)


def packed_mask(length: int) -> torch.Tensor:
    """Return the additive mask of two samples, each of two documents."""
    segments = torch.stack([(torch.arange(length) >= cut).long() for cut in (5, 9)])
    looks = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
    return torch.zeros(looks.shape).masked_fill(~looks, float("-inf"))


def make_cases() -> list[dict]:
    qkv = [drawn(20, 2, heads, 16, seed=seed) for heads, seed in ((6, 1), (2, 2), (2, 3))]
    return [
        {"kind": "norm", "inputs": [drawn(7, 2, 24, seed=4), drawn(24, seed=5)],
         "gradient": drawn(7, 2, 24, seed=6)},
        {"kind": "swiglu", "inputs": [drawn(7, 2, 24, seed=7)],
         "gradient": drawn(7, 2, 12, seed=8)},
        {"kind": "rotary", "inputs": [drawn(7, 2, 4, 16, seed=9)],
         "angles": drawn(7, 1, 1, 16, seed=10),
         "gradient": drawn(7, 2, 4, 16, seed=11)},
        {"kind": "rotary", "inputs": [drawn(7, 2, 4, 16, seed=9)],
         "angles": drawn(7, 1, 1, 8, seed=10),
         "gradient": drawn(7, 2, 4, 16, seed=11)},
        {"kind": "attention", "inputs": qkv, "gradient": drawn(20, 2, 96, seed=12)},
        {"kind": "attention", "inputs": qkv, "mask": packed_mask(20),
         "gradient": drawn(20, 2, 96, seed=12)},
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fused_operations_equal_plain_torch(dtype):
    from tests.support.kernel_bodies import fused_results

    cases = make_cases()
    given = [
        {
            **case,
            "inputs": [x.to(dtype) for x in case["inputs"]],
            "gradient": case["gradient"].to(dtype),
        }
        for case in cases
    ]
    [results] = run_ranks(1, fused_results, tiny(device="npu"), given)
    for case, result in zip(given, results, strict=True):
        inputs = [x.float().clone().requires_grad_() for x in case["inputs"]]
        expected = plain(case, inputs)
        expected.backward(case["gradient"].float())
        for got, wanted in zip(
            (result["output"], *result["gradients"]),
            (expected.detach(), *(x.grad for x in inputs)),
            strict=True,
        ):
            difference = ((got.float() - wanted).norm() / wanted.norm()).item()
            assert got.dtype == dtype and difference < TOLERANCE[dtype], (case["kind"], difference)
