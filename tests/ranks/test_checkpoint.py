"""Checkpoints: a continued run equals the run never stopped; in another layout too, weights, moments and all."""

import pytest
import torch

from tests.support.gather import join_ranks
from tests.support.rank_bodies import steps_from
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCABULARY, tiny

# hidden 36: buckets of the distributed optimizer need padding, which is where Megatron's own saving went wrong
ODD = {"hidden_size": 36, "num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 6, "lr_decay_style": "cosine"}
SAME_LAYOUT = {
    "one process": (1, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2 overlap": (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "pp2 dp2 distributed": (4, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}),
    "tp2 dropout": (2, {"tensor_model_parallel_size": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "bf16 dp2 distributed own": (2, {"bf16": True, "use_distributed_optimizer": True, "use_exit_norm": True,
                                     "untie_exit_output_weights": True}),
}
OTHER_LAYOUT = {
    "dp2 distributed -> one process": ((2, {"use_distributed_optimizer": True}), (1, {"use_distributed_optimizer": True})),
    "pp2 dp2 distributed -> pp4": ((4, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}),
                                   (4, {"pipeline_model_parallel_size": 4, "use_distributed_optimizer": True})),
    "tp2 -> pp2 chunks2": ((2, {"tensor_model_parallel_size": 2}),
                           (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1})),
}


def joined(reports: list[dict], key: str, moment: str | None = None) -> dict[str, torch.Tensor]:
    """Returns whole tensors by name from all ranks' reports, without the rows that pad the vocabulary."""
    whole = join_ranks([r[key] if moment is None else r[key][moment] for r in reports])[0]
    return {name: tensor[:VOCABULARY] if "embedding" in name or "output_layer" in name else tensor for name, tensor in whole.items()}


@pytest.mark.parametrize("name", SAME_LAYOUT)
def test_continued_run_equals_uninterrupted_bit_for_bit(name, tmp_path):
    world_size, changes = SAME_LAYOUT[name]
    settings = tiny(**{**ODD, **changes})
    whole = run_ranks(world_size, steps_from, settings, str(tmp_path), False, 0, 4, False)
    run_ranks(world_size, steps_from, settings, str(tmp_path), False, 0, 2, True)
    rest = run_ranks(world_size, steps_from, settings, str(tmp_path), True, 2, 4, False)
    assert rest[0]["losses"] == whole[0]["losses"][2:]
    for key, moment in (("weights", None), ("moments", "exp_avg"), ("moments", "exp_avg_sq")):
        expected, got = joined(whole, key, moment), joined(rest, key, moment)
        assert expected.keys() == got.keys()
        for tensor_name in expected:
            assert torch.equal(got[tensor_name], expected[tensor_name]), f"{key} {moment} {tensor_name}"


@pytest.mark.parametrize("name", OTHER_LAYOUT)
def test_checkpoint_loads_in_another_layout(name, tmp_path):
    (world_before, before), (world_after, after) = OTHER_LAYOUT[name]
    saved = run_ranks(world_before, steps_from, tiny(**{**ODD, **before}), str(tmp_path), False, 0, 2, True)
    loaded = run_ranks(world_after, steps_from, tiny(**{**ODD, **after}), str(tmp_path), True, 2, 5, False)
    for key, loaded_key, moment in (("weights", "loaded_weights", None), ("moments", "loaded_moments", "exp_avg"),
                                    ("moments", "loaded_moments", "exp_avg_sq")):
        expected, got = joined(saved, key, moment), joined(loaded, loaded_key, moment)
        assert expected.keys() == got.keys()
        for tensor_name in expected:
            assert torch.equal(got[tensor_name], expected[tensor_name]), f"{key} {moment} {tensor_name}"
    never_stopped = run_ranks(world_before, steps_from, tiny(**{**ODD, **before}), str(tmp_path), False, 0, 5, False)
    for (got_losses, *_), (expected_losses, *_) in zip(loaded[0]["losses"], never_stopped[0]["losses"][2:], strict=True):
        assert got_losses == pytest.approx(expected_losses, rel=1e-5)
