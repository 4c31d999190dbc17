"""Evaluation computes every exit forward only; losses and exact matches equal the reference."""

import pytest
import torch

from megatron_sorted.settings.derived import exit_depths
from tests.ranks.test_measures import runs
from tests.support.gather import join_ranks
from tests.support.rank_bodies import evaluate_report
from tests.support.ranks import run_ranks
from tests.support.reference import exit_logits
from tests.support.tiny import VOCABULARY, instruction_samples, tiny

LAYOUTS = [
    (1, {}),
    (2, {"pipeline_model_parallel_size": 2, "exit_layer_weight": (0.0, 0.0, 0.0)}),
    (2, {}),
    (
        2,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "untie_embeddings_and_output_weights": True,
        },
    ),
    (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "use_exit_norm": True,
            "untie_exit_output_weights": True,
        },
    ),
    (4, {"pipeline_model_parallel_size": 4, "recompute_granularity": "full"}),
]


@pytest.mark.parametrize(("world_size", "changes"), LAYOUTS)
def test_every_exit_is_evaluated_as_the_reference_does(world_size, changes):
    settings = tiny(full_validation=True, **changes)
    reports = run_ranks(world_size, evaluate_report, settings)
    weights, _ = join_ranks([r["weights"] for r in reports])
    samples = instruction_samples()
    logits = exit_logits(
        weights,
        samples["tokens"],
        samples["segments"],
        exit_depths(settings),
        settings.num_attention_heads,
        settings.num_query_groups,
        VOCABULARY,
    )
    mask, labels, segments = samples["mask"], samples["labels"], samples["segments"]
    for depth, values in logits.items():
        losses = (
            torch.nn.functional.cross_entropy(values.transpose(1, 2), labels, reduction="none")
            * mask
        )
        right = values.argmax(-1) == labels
        pieces, exact = 0, 0
        for row in range(labels.size(0)):
            for piece in segments[row].unique():
                members = (segments[row] == piece) & (mask[row] > 0)
                if members.any():
                    pieces += 1
                    exact += bool(right[row][members].all())
        for report in reports:
            numbers = report["exits"][depth]
            assert numbers.loss == pytest.approx((losses.sum() / mask.sum()).item(), rel=1e-5)
            assert numbers.token_accuracy == pytest.approx(
                (right * mask).sum().item() / mask.sum().item(), rel=1e-6
            )
            assert numbers.exact_match == pytest.approx(exact / pieces)
            assert report["tokens"] == int(mask.sum())
            agreement, length = runs(
                values.argmax(-1) == logits[settings.num_layers].argmax(-1),
                mask,
                segments,
                settings.num_draft_tokens,
            )
            assert numbers.agreement == pytest.approx(agreement) and numbers.grad_norm is None
            assert numbers.accept_length == pytest.approx(
                1.0 if depth == settings.num_layers else length
            )
    assert 0 < exact < pieces, "the set must hold exact and inexact documents"


def sample_means(losses: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the mean of the mean losses of samples with trained tokens; shapes [n, s]."""
    rows = [
        (row.sum() / trained.sum()).item()
        for row, trained in zip(losses, mask, strict=True)
        if trained.any()
    ]
    assert len(rows) < len(mask), "some sample must be without a trained token"
    return sum(rows) / len(rows)


@pytest.mark.parametrize(
    "world_size, changes",
    [
        (1, {}),
        (2, {"global_batch_size": 32}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ],
)
def test_padding_and_masked_samples_are_in_no_mean_of_means(world_size, changes):
    """Of 16 or 32 samples, 11 are real and one of these is masked; the others count nowhere."""
    settings = tiny(
        full_validation=True, calculate_per_token_loss=False, micro_batch_size=1, **changes
    )
    reports = run_ranks(world_size, evaluate_report, settings)
    weights, _ = join_ranks([r["weights"] for r in reports])
    samples = instruction_samples()
    logits = exit_logits(
        weights,
        samples["tokens"],
        samples["segments"],
        exit_depths(settings),
        settings.num_attention_heads,
        settings.num_query_groups,
        VOCABULARY,
    )
    for depth, values in logits.items():
        losses = (
            torch.nn.functional.cross_entropy(
                values.transpose(1, 2), samples["labels"], reduction="none"
            )
            * samples["mask"]
        )
        for report in reports:
            assert report["exits"][depth].loss == pytest.approx(
                sample_means(losses, samples["mask"]), rel=1e-5
            )
