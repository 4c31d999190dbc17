"""Checkpoints: a resumed run equals the uninterrupted one, in another layout too."""

import os

import pytest
import torch

from tests.support.layouts import (
    CHUNKS,
    DISTRIBUTED,
    OWN,
    PP2,
    PP4,
    SANDWICH,
    SP,
    TP2,
    UNTIED,
    all_but,
    pairwise,
)
from tests.support.rank_bodies import steps_from, steps_with_megatrons_form
from tests.support.ranks import run_ranks
from tests.support.same_state import MOMENTS, assert_same_moments, assert_same_state, joined
from tests.support.tiny import tiny

# hidden 36: buckets of the distributed optimizer need padding, which Megatron's saving got wrong
ODD = {
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 6,
    "lr_decay_style": "cosine",
}
SAME_LAYOUT = {
    "one process": (1, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2 overlap": (
        2,
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
    "pp2 dp2 distributed": (
        4,
        {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True},
    ),
    "tp2 dropout": (
        2,
        {"tensor_model_parallel_size": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    ),
    "tp2 own": (
        2,
        {"tensor_model_parallel_size": 2, "use_exit_norm": True, "untie_exit_output_weights": True},
    ),
    "bf16 dp2 distributed own": (
        2,
        {
            "bf16": True,
            "use_distributed_optimizer": True,
            "use_exit_norm": True,
            "untie_exit_output_weights": True,
        },
    ),
}
BF16, FP16 = {"bf16": True}, {"fp16": True, "loss_scale": 1024.0}
# name: (processes, settings) before, (processes, settings) after
OTHER_LAYOUT = {
    "dp2 distributed -> 1 process": ((2, DISTRIBUTED), (1, DISTRIBUTED)),
    "pp2 dp2 distributed -> pp4": ((4, {**PP2, **DISTRIBUTED}), (4, {**PP4, **DISTRIBUTED})),
    "tp2 -> pp2 chunks2": ((2, TP2), (2, {**PP2, **CHUNKS})),
    "1 process -> tp2 sequence parallel": ((1, {}), (2, {**TP2, **SP})),
    "tp2 pp2 -> 1 process": ((4, {**TP2, **PP2}), (1, {})),
    "pp2 chunks2 untied -> tp2 pp2 sequence parallel": (
        (2, {**PP2, **CHUNKS, **UNTIED}),
        (4, {**TP2, **PP2, **SP, **UNTIED}),
    ),
    "dp4 distributed -> tp2 dp2 distributed sequence parallel": (
        (4, DISTRIBUTED),
        (4, {**TP2, **SP, **DISTRIBUTED}),
    ),
    "pp4 -> dp2": ((4, PP4), (2, {})),
    "own heads pp2 -> own heads tp2": ((2, {**PP2, **OWN}), (2, {**TP2, **OWN})),
    "tp2 pp2 untied distributed -> pp2 chunks2 dp2 distributed": (
        (4, {**TP2, **PP2, **UNTIED, **DISTRIBUTED}),
        (4, {**PP2, **CHUNKS, **UNTIED, **DISTRIBUTED}),
    ),
    "bf16 pp2 dp2 distributed -> bf16 tp2": (
        (4, {**PP2, **BF16, **DISTRIBUTED}),
        (2, {**TP2, **BF16, **DISTRIBUTED}),
    ),
    "sandwich tp2 sequence parallel -> sandwich pp2 layout": (
        (2, {**TP2, **SP, **SANDWICH}),
        (2, {**PP2, **SANDWICH, "pipeline_model_parallel_layout": "Ettt|tL"}),
    ),
    "fp16 tp2 -> fp16 pp2": ((2, {**TP2, **FP16}), (2, {**PP2, **FP16})),
}


@pytest.mark.parametrize("name", pairwise(SAME_LAYOUT))
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    world_size, changes = SAME_LAYOUT[name]
    settings = tiny(**{**ODD, **changes})
    whole = run_ranks(world_size, steps_from, settings, str(tmp_path), False, 0, 4, False)
    run_ranks(world_size, steps_from, settings, str(tmp_path), False, 0, 2, True)
    rest = run_ranks(world_size, steps_from, settings, str(tmp_path), True, 2, 4, False)
    assert rest[0]["losses"] == whole[0]["losses"][2:]
    assert_same_state(rest, whole)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest norm of a tensor's difference over the tensor's own norm."""
    assert one.keys() == other.keys()
    return max(
        (
            (one[name].double() - other[name].double()).norm()
            / one[name].double().norm().clamp(min=1e-12)
        ).item()
        for name in one
    )


@pytest.mark.parametrize(
    "name",
    all_but(
        OTHER_LAYOUT,
        "each layout of its two is left or entered in another row",
        "tp2 pp2 -> 1 process",
        "tp2 -> pp2 chunks2",
        "pp2 chunks2 untied -> tp2 pp2 sequence parallel",
        "pp4 -> dp2",
    ),
)
def test_ten_steps_equal_five_and_five_in_another_layout(name, tmp_path):
    """Check the layout; add a row of docs/reliability.md to the file that RELAYOUT_TABLE names."""
    (world_before, before), (world_after, after) = OTHER_LAYOUT[name]
    saved = run_ranks(
        world_before, steps_from, tiny(**{**ODD, **before}), str(tmp_path), False, 0, 5, True
    )
    loaded = run_ranks(
        world_after, steps_from, tiny(**{**ODD, **after}), str(tmp_path), True, 5, 10, False
    )
    assert_same_state(loaded, saved, loaded=True)
    never_stopped = run_ranks(
        world_before, steps_from, tiny(**{**ODD, **before}), str(tmp_path), False, 0, 10, False
    )
    half = "bf16" in name or "fp16" in name
    pairs = list(zip(loaded[0]["losses"], never_stopped[0]["losses"][5:], strict=True))
    for (got_losses, _, got_rate), (expected_losses, _, expected_rate) in pairs:
        assert (
            got_losses == pytest.approx(expected_losses, rel=2e-3 if half else 1e-5)
            and got_rate == expected_rate
        )
    if "RELAYOUT_TABLE" in os.environ:
        worst = max(
            abs(got[depth] / expected[depth] - 1)
            for (got, *_), (expected, *_) in pairs
            for depth in expected
        )
        moments = [
            largest_difference(joined(never_stopped, "moments", m), joined(loaded, "moments", m))
            for m in MOMENTS
        ]
        weights = largest_difference(joined(never_stopped, "weights"), joined(loaded, "weights"))
        with open(os.environ["RELAYOUT_TABLE"], "a", encoding="utf-8") as table:
            table.write(
                f"| {name} | {len(joined(saved, 'moments', 'exp_avg'))} | 0 | {worst:.1e} | "
                f"{weights:.1e} | {max(moments):.1e} |\n"
            )


@pytest.mark.parametrize(
    ("save", "load"),
    [(steps_from, steps_with_megatrons_form), (steps_with_megatrons_form, steps_from)],
)
def test_optimizer_state_of_parts_and_megatrons_gathered_form_are_one_checkpoint(
    save, load, tmp_path
):
    before, after = tiny(**{**ODD, **TP2, **DISTRIBUTED}), tiny(**{**ODD, **PP2, **DISTRIBUTED})
    saved = run_ranks(4, save, before, str(tmp_path), False, 0, 3, True)
    loaded = run_ranks(2, load, after, str(tmp_path), True, 3, 3, False)
    assert_same_moments(loaded, saved, loaded=True)


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, {}), (1, {})), ((2, TP2), (2, PP2)), ((2, {**PP2, **BF16}), (1, BF16))],
)
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_resumes_with_its_momentum(before, after, momentum, tmp_path):
    sgd = {**ODD, "optimizer": "sgd", "sgd_momentum": momentum, "lr": 0.1}
    run_ranks(before[0], steps_from, tiny(**{**sgd, **before[1]}), str(tmp_path), False, 0, 3, True)
    rest = run_ranks(
        after[0], steps_from, tiny(**{**sgd, **after[1]}), str(tmp_path), True, 3, 5, False
    )
    whole = run_ranks(
        before[0], steps_from, tiny(**{**sgd, **before[1]}), str(tmp_path), False, 0, 5, False
    )
    for (got, *_), (expected, *_) in zip(rest[0]["losses"], whole[0]["losses"][3:], strict=True):
        assert got == pytest.approx(
            expected, rel=2e-3 if "bf16" in after[1] else 1e-6 if before != after else 0.0
        )
