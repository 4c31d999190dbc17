"""--tune-exit: only the exits' own parts train; the base keeps its bits and has no backward."""

import pytest
import torch

from megatron_sorted.model.chunk import is_trained
from tests.ranks.test_exit_parts import LAYOUTS
from tests.ranks.test_layouts import compare
from tests.support.frozen_bodies import activations_kept, optimizer_bytes, train_frozen
from tests.support.gather import join_ranks
from tests.support.layouts import DISTRIBUTED, OVERLAP, PP2, SP, TP2, all_but, thinned
from tests.support.rank_bodies import layers_run, steps_from
from tests.support.ranks import run_ranks
from tests.support.same_state import MOMENTS, assert_same_state, joined
from tests.support.tiny import tiny

TUNE = {"tune_exit": True}
HEADS = {**TUNE, "use_exit_norm": True, "untie_exit_output_weights": True}
BLOCK = {**TUNE, "use_exit_block": True, "use_exit_norm": True}
ADAPTER = {**TUNE, "exit_adapter_rank": 3}
FIRST_ONLY = {**BLOCK, "exit_layer_nums": (1,)}  # every stage but the first has nothing to train
LAST_ONLY = {**BLOCK, "exit_layer_nums": (3,)}  # the first stage has nothing to train
CASES = {
    **{f"block {name}": (size, {**BLOCK, **changes}) for name, (size, changes) in LAYOUTS.items()},
    "heads one process": (1, HEADS),
    "heads tp2 pp2 sequence parallel": (4, {**HEADS, **TP2, **PP2, **SP}),
    "heads untied pp2": (2, {**HEADS, **PP2, "untie_embeddings_and_output_weights": True}),
    "mlp pp2": (2, {**TUNE, **PP2, "use_exit_mlp": True}),
    "adapter tp2 sequence parallel": (2, {**ADAPTER, **TP2, **SP}),
    "first stage only pp2": (2, {**FIRST_ONLY, **PP2}),
    "first stage only pp4": (4, {**FIRST_ONLY, "pipeline_model_parallel_size": 4}),
    "last stage only pp2": (2, {**LAST_ONLY, **PP2}),
    "last stage only pp2 dp2 distributed": (4, {**LAST_ONLY, **PP2, **DISTRIBUTED}),
    "first stage only pp2 dp2 overlap": (4, {**FIRST_ONLY, **PP2, **OVERLAP}),
    "last stage only pp2 chunks2 dp2 overlap": (
        4,
        {**LAST_ONLY, **PP2, **OVERLAP, "num_layers_per_virtual_pipeline_stage": 1},
    ),
    "sampled dp2 overlap": (2, {**BLOCK, **OVERLAP, "exit_sampling": "uniform"}),
    "full recompute pp2": (2, {**BLOCK, **PP2, "recompute_granularity": "full"}),
    "selective recompute tp2": (
        2,
        {
            **BLOCK,
            **TP2,
            "recompute_granularity": "selective",
            "recompute_modules": ("core_attn", "mlp"),
        },
    ),
    "mean of micro-batches": (2, {**BLOCK, **PP2, "calculate_per_token_loss": False}),
}


@pytest.mark.parametrize(
    "name",
    thinned(
        CASES,
        "block one process",
        "block pp4",
        "block tp2 pp2 sequence parallel",
        "heads tp2 pp2 sequence parallel",
        "mlp pp2",
        "adapter tp2 sequence parallel",
        "first stage only pp4",
        "first stage only pp2 dp2 overlap",
        "last stage only pp2 chunks2 dp2 overlap",
        "sampled dp2 overlap",
        "full recompute pp2",
        "selective recompute tp2",
    ),
)
def test_tuned_exits_equal_the_reference_and_the_base_keeps_its_bits(name):
    world_size, changes = CASES[name]
    reports = compare(world_size, tiny(**changes), 1e-5)
    before, after = (
        join_ranks([report[key] for report in reports])[0] for key in ("initial", "weights")
    )
    frozen = [key for key in before if not key.startswith("exit_")]
    assert len(frozen) == 2 + 4 * 6 + changes.get("untie_embeddings_and_output_weights", False)
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert all(not torch.equal(before[key], after[key]) for key in before if key not in frozen)
    assert all(4 not in drawn for drawn in reports[0]["coefficients"])


LONG = {
    "block": (1, BLOCK),
    "heads bf16 dp2 distributed overlap": (2, {**HEADS, **OVERLAP, "bf16": True}),
    "first stage only fp16 pp2": (2, {**FIRST_ONLY, **PP2, "fp16": True, "loss_scale": 1024.0}),
    "adapter tp2 pp2 sequence parallel": (4, {**ADAPTER, **TP2, **PP2, **SP}),
}


@pytest.mark.parametrize("name", thinned(LONG, "block", "first stage only fp16 pp2"))
def test_the_base_keeps_its_bits_over_a_hundred_steps(name):
    world_size, changes = LONG[name]
    settings = tiny(**changes)
    for report in run_ranks(world_size, train_frozen, settings, 100):
        assert report["evaluated"] == {1, 2, 3, 4} & {*settings.exit_layer_nums, 4}
        assert report["frozen"], "nothing was compared"
        for key, (before, after) in report["frozen"].items():
            assert not is_trained(key, settings) and torch.equal(before, after), key
        first, last = report["losses"]
        assert all(last[depth] < first[depth] for depth in last)


@pytest.mark.parametrize("changes", [{}, DISTRIBUTED])
def test_optimizer_state_is_proportional_to_what_trains(changes):
    (everything,), (heads,), (block,) = (
        run_ranks(1, optimizer_bytes, tiny(**parts, **changes))
        for parts in ({}, HEADS, {**TUNE, "use_exit_block": True})
    )
    layer = 2 * 32 + 32 * 64 + 32 * 32 + 3 * 32 * 48
    assert heads["trained"] == 3 * (32 + 104 * 32) and block["trained"] == 3 * layer
    for report in (everything, heads, block):
        assert (
            report["moments"] == 2 * 4 * report["trained"]
            and report["gradients"] - 4 * report["trained"] <= report["padding"]
        )
    assert everything["trained"] == 4 * layer + 32 + 104 * 32


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [(1, {}), (2, PP2), (2, {**PP2, "num_layers_per_virtual_pipeline_stage": 1})],
)
def test_nothing_goes_backward_through_the_base_and_no_activation_is_kept(world_size, changes):
    hidden = 16 * 2 * 32 * 4  # bytes of one micro-batch's hidden state
    for frozen, full in zip(
        run_ranks(world_size, activations_kept, tiny(**BLOCK, **changes)),
        run_ranks(world_size, activations_kept, tiny(**{**BLOCK, **changes, "tune_exit": False})),
        strict=True,
    ):
        assert frozen["backwards"] == 0 and frozen["layers with a graph"] == 0
        assert full["backwards"] > 0 and full["layers with a graph"] > 0
        # for each micro-batch and exit its hidden state, and nothing from the layers between
        assert frozen["saved bytes"] <= hidden * frozen["exits and chunks"]
        assert full["saved bytes"] > 10 * frozen["saved bytes"]


def test_with_one_stage_layers_above_the_deepest_tuned_exit_are_not_run():
    (report,) = run_ranks(
        1, layers_run, tiny(**{**BLOCK, "exit_layer_nums": (1, 3)}), {1: 1.0, 3: 1.0}
    )
    assert [number for number in report if number in (1, 2, 3, 4)] == [1, 2, 3]
    (report,) = run_ranks(
        1, layers_run, tiny(**{**BLOCK, **OVERLAP, "exit_layer_nums": (1, 2)}), {1: 1.0}
    )
    assert report == [1, 2], "overlapped reduction waits for the parts of the deepest tuned exit"


RESUMED = {
    "pp2 first stage only -> one process": ((2, {**FIRST_ONLY, **PP2}), (1, FIRST_ONLY)),
    "pp2 last stage only -> tp2": ((2, {**LAST_ONLY, **PP2}), (2, {**LAST_ONLY, **TP2})),
    "one process -> pp4 last stage only": (
        (1, LAST_ONLY),
        (4, {**LAST_ONLY, "pipeline_model_parallel_size": 4}),
    ),
    "pp2 dp2 distributed last stage only -> dp2 distributed": (
        (4, {**LAST_ONLY, **PP2, **DISTRIBUTED}),
        (2, {**LAST_ONLY, **DISTRIBUTED}),
    ),
    "distributed -> pp2 dp2 distributed last stage only": (
        (1, {**LAST_ONLY, **DISTRIBUTED}),
        (4, {**LAST_ONLY, **PP2, **DISTRIBUTED}),
    ),
    "bf16 pp2 first stage only -> bf16": tuple(
        (size, {**FIRST_ONLY, **layout, "bf16": True}) for size, layout in ((2, PP2), (1, {}))
    ),
    "bf16 -> bf16 pp2 first stage only": tuple(
        (size, {**FIRST_ONLY, **layout, "bf16": True}) for size, layout in ((1, {}), (2, PP2))
    ),
    "pp2 bf16 last stage only -> bf16 pp2": (
        (2, {**LAST_ONLY, **PP2, "bf16": True}),
        (2, {**LAST_ONLY, **PP2, "bf16": True}),
    ),
    "dropout block full training tp2 sequence parallel pp2": tuple(
        (
            4,
            {
                **TP2,
                **SP,
                **PP2,
                "use_exit_block": True,
                "hidden_dropout": 0.1,
                "attention_dropout": 0.1,
            },
        )
        for _ in range(2)
    ),
    "fp16 pp2 last stage only -> fp16": tuple(
        (size, {**LAST_ONLY, **layout, "fp16": True, "loss_scale": 1024.0})
        for size, layout in ((2, PP2), (1, {}))
    ),
    "mlp adapter tp2 -> pp2 chunks2": tuple(
        (2, {**TUNE, "use_exit_mlp": True, "exit_adapter_rank": 3, **layout})
        for layout in (TP2, {**PP2, "num_layers_per_virtual_pipeline_stage": 1})
    ),
    "one norm dp2 distributed (one rank has none of it) -> one process": tuple(
        (size, {**TUNE, **DISTRIBUTED, "use_exit_norm": True, "exit_layer_nums": (2,)})
        for size in (2, 1)
    ),
}


@pytest.mark.parametrize(
    "name",
    all_but(
        RESUMED,
        "dropout is resumed in test_checkpoint.py, and frozen bases in the other rows",
        "dropout block full training tp2 sequence parallel pp2",
    ),
)
def test_a_tuned_run_is_resumed_in_another_layout(name, tmp_path):
    (world_before, before), (world_after, after) = RESUMED[name]
    saved = run_ranks(world_before, steps_from, tiny(**before), str(tmp_path), False, 0, 3, True)
    loaded = run_ranks(world_after, steps_from, tiny(**after), str(tmp_path), True, 3, 6, False)
    whole = run_ranks(world_before, steps_from, tiny(**before), str(tmp_path), False, 0, 6, False)
    assert_same_state(loaded, saved, loaded=True)
    assert all(
        is_trained(key, tiny(**before))
        for moment in MOMENTS
        for key in joined(loaded, "loaded_moments", moment)
    )
    half = before.get("bf16") or before.get("fp16")
    for (losses, norm, rate), (expected_losses, expected_norm, expected_rate) in zip(
        loaded[0]["losses"], whole[0]["losses"][3:], strict=True
    ):
        assert (
            losses == pytest.approx(expected_losses, rel=2e-3 if half else 1e-5)
            and rate == expected_rate
        )
        assert norm == pytest.approx(expected_norm, rel=2e-2 if half else 1e-4)
    if world_before == world_after and before == after:
        assert loaded[0]["losses"] == whole[0]["losses"][3:]
