"""What a platform cannot do is refused with the reason, before anything starts."""

import pytest

from megatron_sorted.errors import PlatformError
from megatron_sorted.model.config import check_platform, uses_transformer_engine
from megatron_sorted.platform.cpu import CpuPlatform
from megatron_sorted.settings.run import Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer_impl": "transformer_engine"}, ["--transformer-impl", "cpu", "local"]),
        ({"context_parallel_size": 2}, ["--context-parallel-size: 2", "Transformer Engine"]),
        ({"num_experts": 4}, ["--num-experts: 4", "router", "Transformer Engine"]),
    ],
)
def test_features_of_transformer_engine_are_refused_on_cpu(changes, message):
    with pytest.raises(PlatformError) as caught:
        check_platform(Settings(**changes), CpuPlatform())
    assert all(word in str(caught.value) for word in message)


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
