"""Copies of parameters on several stages stay equal, and count once in the gradient norm."""

import pytest
import torch

from megatron_sorted.settings.derived import exit_depths
from tests.support.gather import join_ranks
from tests.support.layouts import DISTRIBUTED, PP2, PP4, UNTIED
from tests.support.rank_bodies import train_and_report
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny


@pytest.mark.parametrize(
    ("world_size", "changes", "copies"),
    [
        (4, PP4, 4),
        (4, {**PP4, **UNTIED}, 4),
        (4, {**PP2, **DISTRIBUTED}, 4),
        (
            4,
            {
                **PP2,
                **DISTRIBUTED,
                **UNTIED,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
            4,
        ),
        (4, {**PP2, **UNTIED, "tensor_model_parallel_size": 2, "sequence_parallel": True}, 2),
        (2, {**PP2, "num_layers_per_virtual_pipeline_stage": 1}, 2),
        (4, {**PP2, **UNTIED, **DISTRIBUTED, "bf16": True}, 4),
        (4, {**PP2, "exit_layer_nums": (1,), **UNTIED, "fp16": True, "loss_scale": 64.0}, 4),
    ],
)
def test_copies_are_bitwise_equal_after_ten_steps(world_size, changes, copies):
    settings = tiny(**changes)
    reports = run_ranks(world_size, train_and_report, settings, 10, True, False)
    head = (
        "embedding.word_embeddings.weight"
        if not settings.untie_embeddings_and_output_weights
        else "output_layer.weight"
    )
    _, tensors_of = join_ranks([r["weights"] for r in reports])
    _, started = join_ranks([r["initial"] for r in reports])
    for name in (head, "decoder.final_layernorm.weight"):
        shards = [tensors for key, tensors in tensors_of.items() if key.startswith(f"{name} shard")]
        assert len(shards) == (settings.tensor_model_parallel_size)
        for shard, before in zip(
            shards, (t for k, t in started.items() if k.startswith(f"{name} shard")), strict=True
        ):
            assert len(shard) == copies, f"{name} is held {len(shard)} times"
            assert all(torch.equal(shard[0], other) for other in shard[1:]), (
                f"copies of {name} differ"
            )
            assert not torch.equal(shard[0], before[0]), f"{name} was not trained"


@pytest.mark.parametrize(
    "changes", [{}, UNTIED, {"use_exit_norm": True, "untie_exit_output_weights": True}]
)
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (4, PP4),
        (2, {"tensor_model_parallel_size": 2}),
        (4, {**PP2, **DISTRIBUTED}),
        (2, {**PP2, "num_layers_per_virtual_pipeline_stage": 1}),
    ],
)
def test_gradient_norm_counts_every_parameter_once(world_size, layout, changes):
    """The norm that clipping uses is that of the gradient gathered from all ranks by hand."""
    settings = tiny(**layout, **changes)
    assert len(exit_depths(settings)) == 4
    reports = run_ranks(world_size, train_and_report, settings, 1, False, False)
    gradients, _ = join_ranks([r["gradients"] for r in reports])
    norm = torch.sqrt(sum(g.double().pow(2).sum() for g in gradients.values())).item()
    for report in reports:
        assert report["grad_norms"][0] == pytest.approx(norm, rel=1e-5)
