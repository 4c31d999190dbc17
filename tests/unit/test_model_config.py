"""What a platform cannot do is refused with the reason, before anything starts."""

from dataclasses import replace

import pytest
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.moe import moe_utils

from megatron_sorted.errors import PlatformError
from megatron_sorted.model.config import check_platform, make_config, uses_transformer_engine
from megatron_sorted.model.spec import layer_spec
from megatron_sorted.platform.cpu import CpuPlatform
from megatron_sorted.platform.versions import megatron_version, mlp_parts
from megatron_sorted.settings.run import Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer_impl": "transformer_engine"}, ["--transformer-impl", "cpu", "local"]),
        ({"context_parallel_size": 2}, ["--context-parallel-size: 2", "Transformer Engine"]),
    ],
)
def test_features_of_transformer_engine_are_refused_on_cpu(changes, message):
    with pytest.raises(PlatformError) as caught:
        check_platform(Settings(**changes), CpuPlatform())
    assert all(word in str(caught.value) for word in message)


def test_experts_are_refused_where_the_router_needs_transformer_engine(monkeypatch):
    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    with pytest.raises(PlatformError) as caught:
        check_platform(Settings(num_experts=4), CpuPlatform())
    for text in (
        "--num-experts: 4 needs Transformer Engine",
        f"megatron-core {megatron_version()} ",
        "Install megatron-core 0.17 or later",
    ):
        assert text in str(caught.value)
    monkeypatch.setattr(moe_utils, "te_general_gemm", print, raising=False)
    with pytest.raises(PlatformError, match=r"it is installed, .* cannot run on cpu. Uninstall it"):
        check_platform(Settings(num_experts=4), CpuPlatform())


def test_experts_are_allowed_where_the_router_does_without_transformer_engine(monkeypatch):
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    check_platform(Settings(num_experts=4), CpuPlatform())


def test_unequal_numbers_of_tokens_are_refused_on_gloo(monkeypatch):
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    split = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
    experts = Settings(num_experts=4, sequence_parallel=True, **split)
    check_platform(experts, CpuPlatform())
    with pytest.raises(PlatformError, match=r"--moe-token-dispatcher-type alltoall: .* gloo"):
        check_platform(replace(experts, moe_token_dispatcher_type="alltoall"), CpuPlatform())


@pytest.mark.parametrize(("topk", "is_before"), [(1, True), (2, False)])
def test_a_single_expert_is_weighed_by_the_softmax_over_all(topk, is_before):
    config = make_config(Settings(num_experts=4, moe_router_topk=topk), CpuPlatform())
    assert config.moe_router_pre_softmax is is_before


@pytest.mark.parametrize("num_experts", [None, 4])
def test_mlp_parts_are_those_of_each_expert(num_experts):
    parts = mlp_parts(layer_spec(Settings(num_experts=num_experts), False))
    assert parts.linear_fc1 is ColumnParallelLinear


def test_auto_takes_local_layers_on_cpu():
    check_platform(Settings(), CpuPlatform())
    assert not uses_transformer_engine(Settings(transformer_impl="auto"), CpuPlatform())


def test_a_torch_that_cannot_sum_shards_is_refused_before_anything_starts(monkeypatch):
    sharded = Settings(data_parallel="fsdp")
    check_platform(sharded, CpuPlatform())
    monkeypatch.setattr("megatron_sorted.parallel.fsdp.FSDPModule", object)
    check_platform(Settings(), CpuPlatform())
    with pytest.raises(
        PlatformError,
        match=r"--data-parallel fsdp: torch .* "
        r"Install torch 2\.8 or later, or use --data-parallel ddp",
    ):
        check_platform(sharded, CpuPlatform())
