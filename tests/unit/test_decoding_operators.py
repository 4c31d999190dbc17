"""Numbers and operators of decoding by torch: the norm, and what the host starts in a layer."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_sorted.decoding.cache.norm import RmsNorm
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.platform.kernels import FusedKernels
from tests.support.decoding import plain_network

MOST = {"llama": 33, "mistral": 34, "qwen2": 33, "qwen3": 42}
"""Greatest number of operators of a layer in a pass over one token."""


class Names(TorchDispatchMode):
    """The names of all operators that torch dispatches, those of composite ones one by one."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def theirs(size: int, dtype: torch.dtype, epsilon: float = 1e-5) -> LlamaRMSNorm:
    module = LlamaRMSNorm(size, epsilon).requires_grad_(False)
    module.weight.copy_(torch.rand(size) + 0.5)
    return module.to(dtype)


@pytest.mark.parametrize("size", [1, 64, 172, 640, 4096])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_the_norm_is_that_of_transformers(size, scale):
    torch.manual_seed(size)
    module, x = theirs(size, torch.float32), torch.randn(5, size) * scale
    given = x.clone()
    torch.testing.assert_close(RmsNorm.of(module)(x), module(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(x, given)
    assert torch.equal(RmsNorm.of(module)(torch.zeros(2, size)), torch.zeros(2, size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_halves_is_rounded_where_transformers_rounds(dtype):
    torch.manual_seed(0)
    module, x = theirs(640, dtype), torch.randn(200, 640).to(dtype)
    got, want = RmsNorm.of(module)(x), module(x)
    assert got.dtype == dtype
    # the root may differ in its last bit, and so a number that lies between two others
    assert (got != want).double().mean() < 1e-3
    fewer = (x.float() * torch.rsqrt(x.float().square().mean(-1, True) + 1e-5)) * module.weight
    assert (fewer.to(dtype) != want).double().mean() > 0.1, "the test sees one rounding too few"


def test_the_norm_does_not_depend_on_the_number_of_tokens():
    torch.manual_seed(0)
    norm = RmsNorm.of(theirs(172, torch.float32))
    for n in range(1, 17):
        x = torch.randn(n, 172)
        assert torch.equal(norm(x), torch.cat([norm(row[None]) for row in x]))


def test_each_head_has_a_weight_of_its_own():
    weight, x = torch.rand(3, 8), torch.randn(2, 5, 3, 8)
    want = x / (x.square().mean(-1, True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(RmsNorm(weight, 1e-6)(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(8,), (3, 8)])
@pytest.mark.parametrize("fused", [True, False])
def test_another_device_uses_its_own_operation(shape, fused, monkeypatch):
    def kernel(x, weight, epsilon):
        return x * 0 + weight * 2 + epsilon

    kernels = FusedKernels(rms_norm=kernel) if fused else FusedKernels()
    monkeypatch.setattr("megatron_sorted.decoding.cache.norm.kernels_of", lambda device: kernels)
    norm = RmsNorm(torch.rand(shape), 1e-3)
    norm._on_cpu = False
    x = torch.randn(2, 3, 8)
    if fused and len(shape) == 1:
        want = x * 0 + norm.weight * 2 + 1e-3
    else:
        want = x / (x.square().mean(-1, True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", MOST)
@torch.no_grad()
def test_a_layer_starts_few_operators(family):
    _, network = plain_network(family)
    counted = {}
    for stop in (1, 3):
        state = DecodingState(network, 1, 40, [stop])
        state.append(torch.arange(9)[None])
        state.read(stop)
        state.append(torch.tensor([[3]]))
        with Names() as names:
            state.read(stop)
        counted[stop] = names.names
    a_layer = (len(counted[3]) - len(counted[1])) / 2
    assert math.ceil(a_layer) <= MOST[family], sorted(counted[3])
