"""Learned rules in parallel layouts: losses, coefficients and weights equal plain PyTorch.

Processes start once for each layout and train all runs one after another.
"""

import json

import pytest
import torch

from megatron_sorted.settings.derived import exit_depths
from tests.ranks.test_layouts import relative
from tests.support.gather import join_ranks
from tests.support.layouts import FSDP, PP2, SP, TP2, all_but
from tests.support.ranks import run_ranks
from tests.support.rule_bodies import train_each
from tests.support.rule_reference import reference_run
from tests.support.tiny import make_samples, tiny

LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "tp2 pp2 sequence parallel": (4, {**TP2, **PP2, **SP}),
    "pp2 chunks2": (2, {**PP2, "num_layers_per_virtual_pipeline_stage": 1}),
    "dp2": (2, {}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "fsdp dp2": (2, FSDP),
}
# rates far above the defaults, so that five steps move the coefficients
RULES = {
    "uncertainty": {"exit_uncertainty_rate": 0.3},
    "inverse_loss": {"exit_inverse_loss_decay": 0.5},
    "dwa": {"exit_dwa_window": 2, "exit_dwa_temperature": 0.05},
    "gradnorm": {"exit_gradnorm_rate": 0.3},
    "simulated_exit": {"train_iters": 6, "exit_simulated_thresholds": 3},
    "excess_loss": {
        "exit_excess_rate": 1.0,
        "exit_reference_loss": (4.6, 4.4, 4.3, 4.5),
        "exit_excess_smoothing": 0.1,
    },
}
GUARD = {
    "exit_guard": True,
    "exit_guard_loss": 4.0,
    "exit_guard_margin": 0.1,
    "exit_guard_rate": 0.2,
    "exit_guard_decay": 0.5,
}
DROPOUT = {"layer_dropout": 0.6, "train_iters": 6}
STEPS, POISONED, TOLERANCE = 5, 2, 2e-5


def named(rule: str) -> dict:
    """Return the settings of a learned rule."""
    return {"exit_layer_weight_rule": rule, **RULES[rule]}


COMPARED = {
    **{rule: named(rule) for rule in RULES},
    "guard": GUARD,
    "guard on inverse_loss": {**GUARD, **named("inverse_loss")},
    "layer dropout": DROPOUT,
    "layer dropout growing": {**DROPOUT, "layer_dropout_schedule": "exponential"},
    "layer dropout, gradnorm, selective recompute": {
        **DROPOUT,
        **named("gradnorm"),
        "recompute_granularity": "selective",
    },
    "a step that is not finite": named("inverse_loss"),
}


def check_equal(settings, reports, skipped=()):
    """Compare the ranks' reports of one run with each other and with the reference."""
    initial, _ = join_ranks([r["initial"] for r in reports])
    losses, coefficients, weights, after = reference_run(
        settings, initial, STEPS, exit_depths(settings), make_samples, skipped
    )
    for report in reports:
        assert (
            report["coefficients"] == reports[0]["coefficients"]
            and report["state"] == reports[0]["state"]
        ), "ranks differ"
    for step in range(STEPS):
        assert reports[0]["coefficients"][step] == pytest.approx(
            coefficients[step], rel=TOLERANCE
        ), f"coefficients of step {step}"
        if step not in skipped:
            assert reports[0]["losses"][step] == pytest.approx(losses[step], rel=TOLERANCE), (
                f"losses of step {step}"
            )
            if reports[0]["observed"][step] is not None:
                assert reports[0]["observed"][step].losses == pytest.approx(
                    reports[0]["losses"][step], rel=1e-6
                )
    assert reports[0]["next"] == pytest.approx(after, rel=TOLERANCE)
    trained, _ = join_ranks([r["weights"] for r in reports])
    for name, weight in weights.items():
        real = slice(0, settings.vocab_size if "embedding" in name else None)
        assert relative(trained[name][real], weight[real]) < TOLERANCE, (
            f"weight {name}: {relative(trained[name][real], weight[real])}"
        )


@pytest.mark.parametrize(
    "layout",
    all_but(
        LAYOUTS, "the other rows split what it splits, and more", "one process", "pp2", "dp2", "tp2"
    ),
)
def test_rules_guard_and_layer_dropout_equal_the_reference(layout):
    world_size, changes = LAYOUTS[layout]
    runs = {name: (tiny(**{**more, **changes}), 0, STEPS) for name, more in COMPARED.items()}
    runs["a step that is not finite"] += (None, None, POISONED)
    ranks = run_ranks(world_size, train_each, runs, tiny(**changes))
    for name, (settings, *_) in runs.items():
        reports = [rank[name] for rank in ranks]
        check_equal(settings, reports, [POISONED] if name == "a step that is not finite" else [])
        first, after = reports[0]["coefficients"][0], reports[0]["next"]
        if name in RULES:
            assert max(abs(after[d] - first[d]) for d in first) > 5e-4, (
                f"{name} does not move, which shows nothing"
            )
        if "guard" in name:
            assert reports[0]["state"]["guard"]["multiplier"] > 0.1 and after[4] > 0.3
        if name == "a step that is not finite":
            assert [seen is None for seen in reports[0]["observed"]] == [
                step == POISONED for step in range(STEPS)
            ]
    reports = ranks[0]
    plain, dropped = (
        join_ranks([rank[name]["weights"] for rank in ranks])[0]
        for name in ("uncertainty", "layer dropout")
    )
    assert not torch.equal(
        plain["decoder.layers.3.mlp.linear_fc2.weight"],
        dropped["decoder.layers.3.mlp.linear_fc2.weight"],
    )
    # the sums join an existing all-reduce; where tokens leave costs one all-gather over the stages
    for rule in RULES:
        extra = (
            1
            if rule == "simulated_exit" and changes.get("pipeline_model_parallel_size", 1) > 1
            else 0
        )
        without, learned = (
            reports["layer dropout"]["collectives"][1],
            reports[rule]["collectives"][1],
        )
        assert {name: learned[name] - without[name] for name in without} == dict.fromkeys(
            without, 0
        ) | {"all_gather": extra}, rule


@pytest.mark.parametrize("layout", ["pp2", "tp2 pp2 sequence parallel", "dp2"])
def test_losses_of_micro_batch_means_and_fp16(layout):
    world_size, changes = LAYOUTS[layout]
    half = {"fp16": True, "exit_layer_weight_rule": "gradnorm"}
    runs = {
        "means": (
            tiny(exit_layer_weight_rule="gradnorm", calculate_per_token_loss=False, **changes),
            0,
            1,
        ),
        "fp16": (tiny(**half, loss_scale=1024.0, **changes), 0, 1),
        "fp32": (tiny(exit_layer_weight_rule="gradnorm", **changes), 0, 1),
        "overflow": (tiny(**half, initial_loss_scale=2.0**40, hysteresis=1, **changes), 0, 1),
    }
    ranks = run_ranks(world_size, train_each, runs, tiny(**changes))
    seen = {name: ranks[0][name]["observed"][0] for name in runs}
    assert seen["means"].losses == pytest.approx(ranks[0]["means"]["losses"][0], rel=1e-6)
    assert seen["fp16"].grad_norms == pytest.approx(seen["fp32"].grad_norms, rel=1e-2)
    assert seen["overflow"] is None and ranks[0]["overflow"]["state"]["first_losses"] == {}


@pytest.mark.parametrize("layout", ["pp2", "tp2"])
def test_three_steps_and_three_resumed_equal_six_in_another_layout_too(layout, tmp_path):
    """The run is saved in pp2; in the same layout it is equal bit for bit."""
    whole_runs, rest_runs = {}, {}
    for rule in RULES:
        settings_of_rule = {**named(rule), **GUARD}
        whole_runs[f"{rule} whole"] = (tiny(**settings_of_rule, **PP2), 0, 6)
        whole_runs[f"{rule} saved"] = (
            tiny(**settings_of_rule, **PP2),
            0,
            3,
            None,
            str(tmp_path / rule),
        )
        rest_runs[rule] = (
            tiny(**settings_of_rule, **LAYOUTS[layout][1]),
            3,
            6,
            str(tmp_path / rule),
        )
    before = run_ranks(2, train_each, whole_runs, tiny(**PP2))[0]
    after = run_ranks(2, train_each, rest_runs, tiny(**LAYOUTS[layout][1]))[0]
    for rule in RULES:
        whole, saved, rest = before[f"{rule} whole"], before[f"{rule} saved"], after[rule]
        assert json.loads(json.dumps(whole["state"])) == whole["state"]
        if layout == "pp2":
            assert saved["coefficients"] + rest["coefficients"] == whole["coefficients"]
            assert rest["state"] == whole["state"] and rest["losses"] == whole["losses"][3:]
        for step in range(3):
            assert rest["coefficients"][step] == pytest.approx(
                whole["coefficients"][3 + step], rel=TOLERANCE
            )
            assert rest["losses"][step] == pytest.approx(whole["losses"][3 + step], rel=TOLERANCE)


@pytest.mark.parametrize("layout", ["one process", "pp2", "dp2"])
def test_rules_observe_only_the_exits_drawn_by_their_coefficients(layout):
    world_size, changes = LAYOUTS[layout]
    drawn = {
        "exit_sampling": "coefficients",
        "num_sampled_exits": 2,
        "exit_curriculum": "gradual",
        "train_iters": 6,
    }
    runs = {rule: (tiny(**{**named(rule), **drawn, **changes}), 0, 6) for rule in RULES}
    ranks = run_ranks(world_size, train_each, runs, tiny(**changes))
    for rule in RULES:
        first = ranks[0][rule]
        assert all(rank[rule]["coefficients"] == first["coefficients"] for rank in ranks)
        assert first["coefficients"][0] == {4: 1.0} and all(
            sum(c.values()) == pytest.approx(1) for c in first["coefficients"]
        )
        assert any(len(c) > 1 for c in first["coefficients"])
        for coefficients, seen in zip(first["coefficients"], first["observed"], strict=True):
            assert seen.coefficients == coefficients and seen.losses.keys() == coefficients.keys()
            assert not seen.exit_shares or sum(seen.exit_shares.values()) == pytest.approx(1)
