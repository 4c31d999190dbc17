"""Megatron's GPTModel is a second reference: it loads our checkpoints and has the same losses."""

import pytest
import torch

from tests.support.rank_bodies import (
    gpt_model_reads_our_checkpoint,
    layers_run,
    segments_against_block,
)
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny


@pytest.mark.parametrize("changes", [{}, {"untie_embeddings_and_output_weights": True}])
def test_gpt_model_loads_our_checkpoint_and_has_the_same_loss(changes, tmp_path):
    settings = tiny(
        make_vocab_size_divisible_by=4, **changes
    )  # 100 is a multiple: GPTModel counts padding in its softmax
    (report,) = run_ranks(1, gpt_model_reads_our_checkpoint, settings, str(tmp_path))
    assert report["missing"] == [] and report["unexpected"] == []
    assert report["theirs"] == pytest.approx(report["ours"], rel=1e-6)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("ends", [[1, 2, 3, 4], [2, 4], [4]])
def test_segments_equal_the_whole_block_bit_for_bit(recompute, ends):
    (report,) = run_ranks(1, segments_against_block, tiny(recompute_granularity=recompute), ends)
    assert torch.equal(report["whole"], report["cut"])
    assert report["gradients"], "nothing was compared"
    for name, (whole, cut) in report["gradients"].items():
        assert torch.equal(whole, cut), name


def test_layers_above_the_deepest_drawn_exit_are_not_run_with_one_stage():
    (report,) = run_ranks(1, layers_run, tiny(), {2: 1.0})
    assert report == [1, 2]
    for stage in run_ranks(2, layers_run, tiny(pipeline_model_parallel_size=2), {2: 1.0}):
        assert len(stage) == 2, "with several stages every layer is run"
