"""Fully sharded data parallelism equals the reference and shares checkpoints with other layouts."""

import pytest
import torch

from tests.ranks.test_checkpoint import ODD
from tests.ranks.test_gradient_rules import check as check_rule
from tests.ranks.test_layouts import compare
from tests.ranks.test_precision import (
    BF16_GRADIENT,
    BF16_LOSS,
    FP16_GRADIENT,
    FP16_LOSS,
    check_against_reference,
)
from tests.support.layouts import DISTRIBUTED, FSDP, OWN, SEQUENCE, UNTIED, all_but, pairwise
from tests.support.rank_bodies import steps_from, train_and_report
from tests.support.ranks import run_ranks
from tests.support.same_state import assert_same_state
from tests.support.tiny import tiny

BF16, FP16 = {"bf16": True}, {"fp16": True, "loss_scale": 1024.0}
FULL, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
# 6 rows for 4 ranks: 2, 2, 2 and none
UNEVEN = {
    "hidden_size": 6,
    "num_attention_heads": 3,
    "num_query_groups": 3,
    "kv_channels": 2,
    "untie_embeddings_and_output_weights": True,
}
LAYOUTS = {
    "one process": (1, {}),
    "dp2": (2, {}),
    "dp2 untied": (2, UNTIED),
    "dp2 own": (2, OWN),
    "dp2 untied own norm": (2, {**UNTIED, "use_exit_norm": True}),
    "dp2 untied own full recompute": (2, {**UNTIED, **OWN, **FULL}),
    "dp2 selective recompute": (2, SELECTIVE),
    "dp2 mean of micro-batches": (2, {"calculate_per_token_loss": False, "micro_batch_size": 1}),
    "dp2 one exit a step": (2, {**UNTIED, "exit_sampling": "uniform", "num_sampled_exits": 1}),
    "dp4": (4, {}),
    "dp4 untied full recompute": (4, {**UNTIED, **FULL}),
    "dp4 own": (4, OWN),
    "dp4 ranks without rows": (4, UNEVEN),
}


@pytest.mark.parametrize("name", pairwise(LAYOUTS, "dp2"))
def test_layout_equals_reference(name):
    world_size, changes = LAYOUTS[name]
    compare(world_size, tiny(**FSDP, **changes), 1e-5)


@pytest.mark.parametrize("changes", [{}, {**UNTIED, **OWN}])
def test_gradients_are_joined_at_exits(changes):
    check_rule(2, tiny(**FSDP, exit_gradient_rule="project", **changes), unequal=True, packed=True)


@pytest.mark.parametrize(("world_size", "changes"), [(2, {}), (4, {**UNTIED, **OWN})])
@pytest.mark.parametrize(
    ("precision", "loss", "gradient"),
    [(BF16, BF16_LOSS, BF16_GRADIENT), (FP16, FP16_LOSS, FP16_GRADIENT)],
)
def test_half_precision(world_size, changes, precision, loss, gradient):
    check_against_reference(world_size, tiny(**FSDP, **precision, **changes), loss, gradient)


def test_fp16_skips_a_step_that_overflows_and_lowers_the_scale():
    settings = tiny(**FSDP, fp16=True, initial_loss_scale=2.0**40, hysteresis=1)
    reports = run_ranks(2, train_and_report, settings, 1, False, False)
    before, after = (
        {name: entries[0][0] for name, entries in reports[0][key].items()}
        for key in ("initial", "weights")
    )
    assert all(torch.equal(before[name], after[name]) for name in before), (
        "a step with infinite gradients must change nothing"
    )
    assert [report["loss_scale"] for report in reports] == [2.0**39] * 2


SAME = {
    "dp2": (2, {}),
    "dp4 untied": (4, UNTIED),
    "bf16 dp2 own": (2, {**BF16, **OWN}),
    "fp16 dp2": (2, FP16),
    "dp4 ranks without rows": (4, UNEVEN),
    "dp2 dropout": (2, {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
}


@pytest.mark.parametrize(
    "name", all_but(SAME, "dp4 stands in another row, untied in the table above", "dp4 untied")
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    world_size, changes = SAME[name]
    settings = tiny(**{**ODD, **FSDP, **changes})
    whole = run_ranks(world_size, steps_from, settings, str(tmp_path), False, 0, 4, False)
    run_ranks(world_size, steps_from, settings, str(tmp_path), False, 0, 2, True)
    rest = run_ranks(world_size, steps_from, settings, str(tmp_path), True, 2, 4, False)
    assert rest[0]["losses"] == whole[0]["losses"][2:]
    assert_same_state(rest, whole)


OTHER = {
    "dp2 -> dp4": ((2, FSDP), (4, FSDP)),
    "dp4 -> one process": ((4, FSDP), (1, FSDP)),
    "fsdp dp4 -> ddp distributed dp2": ((4, FSDP), (2, DISTRIBUTED)),
    "ddp distributed dp2 -> fsdp dp4": ((2, DISTRIBUTED), (4, FSDP)),
    "fsdp dp2 untied -> tp2 sequence parallel distributed": (
        (2, {**FSDP, **UNTIED}),
        (2, {**SEQUENCE, **UNTIED, **DISTRIBUTED}),
    ),
    "bf16 fsdp dp2 own -> bf16 ddp distributed dp4": (
        (2, {**FSDP, **BF16, **OWN}),
        (4, {**DISTRIBUTED, **BF16, **OWN}),
    ),
    "bf16 ddp distributed dp2 -> bf16 fsdp dp2": (
        (2, {**DISTRIBUTED, **BF16}),
        (2, {**FSDP, **BF16}),
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_checkpoints_are_loaded_in_other_layouts(name, tmp_path):
    (world_before, before), (world_after, after) = OTHER[name]
    saved = run_ranks(
        world_before, steps_from, tiny(**{**ODD, **before}), str(tmp_path), False, 0, 3, True
    )
    loaded = run_ranks(
        world_after, steps_from, tiny(**{**ODD, **after}), str(tmp_path), True, 3, 5, False
    )
    assert_same_state(
        loaded, saved, loaded=True, weights_as=torch.bfloat16 if "bf16" in before else None
    )
    never_stopped = run_ranks(
        world_before, steps_from, tiny(**{**ODD, **before}), str(tmp_path), False, 0, 5, False
    )
    for (got, _, got_rate), (expected, _, expected_rate) in zip(
        loaded[0]["losses"], never_stopped[0]["losses"][3:], strict=True
    ):
        assert (
            got == pytest.approx(expected, rel=2e-3 if "bf16" in before else 1e-5)
            and got_rate == expected_rate
        )
