"""Context parallelism without its attention: slices of a batch, angles, losses and gradients.

Attention across ranks needs Transformer Engine, and nothing here runs it.
"""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.support.context_bodies import evaluate, parts_of_batch, train
from tests.support.gather import join_ranks
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny

CONTEXT_2 = {"context_parallel_size": 2}
TENSORS = ("tokens_bs", "labels_bs", "loss_mask_bs", "pieces_bs", "positions_bs")
# of 16 positions in 2 x 2 slices of 4, rank r takes the slices r and 3 - r
SLICES = ([0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11])
# layout of 4 processes -> context parallel rank and data parallel rank of each process
PLACES = {
    "dp2": ({}, [(0, 0), (1, 0), (0, 1), (1, 1)]),
    "tp2": ({"tensor_model_parallel_size": 2}, [(0, 0), (0, 0), (1, 0), (1, 0)]),
    "pp2": ({"pipeline_model_parallel_size": 2}, [(0, 0), (1, 0), (0, 0), (1, 0)]),
}


@pytest.mark.parametrize("layout", PLACES)
def test_each_rank_takes_its_slices_of_a_batch(layout):
    changes, places = PLACES[layout]
    settings = tiny(**CONTEXT_2, **changes)
    reports = run_ranks(4, parts_of_batch, settings)
    for (context_rank, data_rank), report in zip(places, reports, strict=True):
        own = SLICES[context_rank]
        assert report["data_rank"] == data_rank
        for name in TENSORS:
            expected = report["whole"][name][:, own]
            for where in ("host", "device"):
                assert torch.equal(report[where][name], expected), f"{name}, rank {report['rank']}"
        assert report["host"]["checksum"] == report["whole"]["checksum"]
        assert report["num_tokens"] == int(report["whole"]["loss_mask_bs"][:, own].sum())
        expected_labels = report["whole"]["labels_bs"][:, own].t().reshape(-1)
        assert torch.equal(report["labels"], expected_labels)
        angles = torch.tensor(own).float()[:, None] * report["frequencies"]
        torch.testing.assert_close(report["angles"], torch.cat((angles, angles), 1))
    for data_rank in {place[1] for place in places}:
        _check_each_position_once(
            [
                report
                for place, report in zip(places, reports, strict=True)
                if place[1] == data_rank
            ],
            copies=len(places) // 2 // len({place[1] for place in places}),
        )


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_angles_of_a_slice_are_those_of_the_whole_scaled_sample(kind):
    """The context is longer than a slice, so a rank that took its own length would not scale."""
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=10,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": 10000.0,
            "factor": 4.0,
            **({"original_max_position_embeddings": 10} if kind == "yarn" else {}),
        },
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, seq_len=torch.tensor(16))
    plain, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    assert (frequencies / plain - 1).abs().max() > 0.1
    settings = tiny(
        **CONTEXT_2,
        rope_scaling_type=kind,
        rope_scaling_factor=4.0,
        rope_scaling_original_max_position_embeddings=10,
    )
    reports = run_ranks(2, parts_of_batch, settings)
    for own, report in zip(SLICES, reports, strict=True):
        angles = torch.tensor(own).float()[:, None] * frequencies
        torch.testing.assert_close(report["angles"], torch.cat((angles, angles), 1))


def _check_each_position_once(reports: list[dict], copies: int) -> None:
    """Check that the ranks of a sample together hold each position, ``copies`` times each."""
    for name in TENSORS:
        whole = reports[0]["whole"][name]
        held = torch.cat([report["host"][name] for report in reports], 1).sort(1).values
        assert torch.equal(held, whole.sort(1).values.repeat_interleave(copies, 1)), name


# With a window of one token each token attends to itself only, so ranks need not exchange keys and
# values; learned positions show whether each rank has those of its slices.
LOCAL = {"sliding_window": 1, "position_embedding_type": "learned_absolute"}
PER_TOKEN = {"calculate_per_token_loss": True}
# processes without context parallelism that start from the same weights, and the layout
LAYOUTS = {
    "dp2 per token": (1, PER_TOKEN),
    "dp2 distributed": (1, {"use_distributed_optimizer": True}),
    "tp2 sequence parallel per token": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, **PER_TOKEN},
    ),
    "pp2 per token distributed": (
        2,
        {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True, **PER_TOKEN},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_gradients_and_weights_equal_those_without_context_parallelism(layout):
    processes, changes = LAYOUTS[layout]
    settings = tiny(**LOCAL, **changes)
    # means of micro-batches are taken on each rank first, as Megatron does: equal only where ranks
    # hold the same number of trained tokens
    unequal = settings.calculate_per_token_loss
    expected = run_ranks(processes, train, settings, 2, unequal)
    reports = run_ranks(4, train, dataclasses.replace(settings, **CONTEXT_2), 2, unequal)
    for report in reports:
        for got, wanted in zip(report["losses"], expected[0]["losses"], strict=True):
            assert got == pytest.approx(wanted, rel=1e-5)
        assert report["grad_norms"] == pytest.approx(expected[0]["grad_norms"], rel=1e-4)
    for kind in ("gradients", "weights"):
        got, _ = join_ranks([report[kind] for report in reports])
        wanted, _ = join_ranks([report[kind] for report in expected])
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            difference = (got[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
            assert difference < 1e-5, f"{kind} of {name}: {difference}"


def test_an_evaluation_takes_means_over_whole_micro_batches():
    (alone,) = run_ranks(1, evaluate, tiny(**LOCAL, full_validation=True))
    for losses in run_ranks(4, evaluate, tiny(**LOCAL, **CONTEXT_2, full_validation=True)):
        assert losses == pytest.approx(alone, rel=1e-5)
