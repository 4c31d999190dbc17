"""Self-distillation in every layout: losses, gradients and weights equal plain PyTorch."""

import pytest

from megatron_sorted.settings.run import Settings
from tests.ranks.test_layouts import compare, mean_by_rule, reference_run, relative
from tests.support.gather import join_ranks
from tests.support.layouts import (
    CHUNKS,
    DEEP,
    OVERLAP,
    OWN,
    PP2,
    PP4,
    SEQUENCE,
    TP2,
    UNTIED,
    thinned,
)
from tests.support.measure_bodies import host_waits
from tests.support.rank_bodies import train_and_report
from tests.support.ranks import run_ranks
from tests.support.taught import Objective
from tests.support.tiny import tiny

TAUGHT = {"exit_kd_weight": 0.7, "exit_kd_temperature": 2.0, "log_exit_gradients": True}
CUT = {**TAUGHT, "exit_kd_top_k": 9}
CHOICE = {"exit_kd_weight": 0.7, "exit_kd_target": "choice", "log_exit_gradients": True}
LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, TP2),
    "tp2 sequence parallel": (2, SEQUENCE),
    "pp2": (2, PP2),
    "pp2 own untied": (2, {**PP2, **OWN, **UNTIED}),
    "pp2 own tied": (2, {**PP2, **OWN}),
    "pp2 chunks2": (2, {**PP2, **CHUNKS}),
    "pp2 chunks2 own selective": (
        2,
        {**PP2, **CHUNKS, **OWN, "recompute_granularity": "selective"},
    ),
    "pp4": (4, PP4),
    "pp4 full recompute": (4, {**PP4, **UNTIED, "recompute_granularity": "full"}),
    "pp4 chunks2 8 layers": (4, {**PP4, **CHUNKS, **DEEP}),
    "pp4 chunks2 8 layers own": (4, {**PP4, **CHUNKS, **DEEP, **OWN, **UNTIED}),
    "tp2 pp2 sequence parallel": (4, {**SEQUENCE, **PP2}),
    "dp2 distributed overlap": (2, OVERLAP),
    "dp2 distributed overlap own": (2, {**OVERLAP, **OWN, **UNTIED}),
    "pp2 dp2 distributed overlap own": (4, {**OVERLAP, **PP2, **OWN}),
    "pp2 chunks2 dp2 distributed overlap": (4, {**OVERLAP, **PP2, **CHUNKS}),
}


def check(world_size: int, settings: Settings, **options) -> list[dict]:
    """Compare a layout with plain PyTorch, also divergences and gradients; return the reports."""
    objective = Objective(mean_by_rule)
    reports = compare(world_size, settings, 1e-5, objective=objective, **options)
    for step, (kd, meetings) in enumerate(zip(objective.kd, objective.meetings, strict=True)):
        for depth, numbers in reports[0]["exits"][step].items():
            if depth == settings.num_layers:
                assert (
                    numbers.kd is None
                    and numbers.gradient_cosine is None
                    and numbers.gradient_ratio is None
                )
                continue
            # a small difference of larger sums, within the precision of fp32
            assert numbers.kd == pytest.approx(kd[depth], rel=1e-5, abs=3e-7), (
                f"divergence of exit {depth} at step {step}"
            )
            if settings.exit_kd_target == "choice":
                assert numbers.agreement == pytest.approx(objective.agreement[step][depth])
            if depth in meetings:
                cosine, ratio = meetings[depth]
                assert numbers.gradient_cosine == pytest.approx(
                    cosine, abs=2e-6
                ) and numbers.gradient_ratio == pytest.approx(ratio, rel=1e-5)
    return reports


@pytest.mark.parametrize(
    "name",
    thinned(
        LAYOUTS,
        "one process",
        "tp2 sequence parallel",
        "pp2 own untied",
        "pp2 chunks2 own selective",
        "pp4",
        "pp4 full recompute",
        "pp4 chunks2 8 layers own",
        "tp2 pp2 sequence parallel",
        "pp2 chunks2 dp2 distributed overlap",
        "dp2 distributed overlap own",
    ),
)
def test_taught_exits_equal_the_reference(name):
    world_size, changes = LAYOUTS[name]
    check(world_size, tiny(**TAUGHT, **changes))


@pytest.mark.parametrize(
    "name",
    thinned(
        ["one process", "tp2", "tp2 sequence parallel", "pp4", "tp2 pp2 sequence parallel"],
        "tp2",
        "tp2 pp2 sequence parallel",
    ),
)
# a shard of tp2 has 52 rows: 60 spans both
@pytest.mark.parametrize("top_k", thinned([1, 9, 60, 100], 9, 60))
def test_a_teacher_cut_to_its_most_likely_tokens(name, top_k):
    world_size, changes = LAYOUTS[name]
    check(world_size, tiny(**{**CUT, "exit_kd_top_k": top_k}, **changes))


@pytest.mark.parametrize("weight", thinned([1.0, 0.7], 0.7))
@pytest.mark.parametrize(
    "name",
    thinned(
        [
            "one process",
            "tp2",
            "tp2 sequence parallel",
            "pp2",
            "pp2 chunks2 own selective",
            "tp2 pp2 sequence parallel",
            "dp2 distributed overlap own",
        ],
        "tp2",
        "pp2",
        "tp2 pp2 sequence parallel",
    ),
)
def test_exits_that_learn_the_teachers_choice(name, weight):
    world_size, changes = LAYOUTS[name]
    check(world_size, tiny(**{**CHOICE, "exit_kd_weight": weight}, **changes))


@pytest.mark.parametrize("per_token", thinned([True, False], False))
def test_the_choice_with_unequal_samples_and_packed_documents(per_token):
    world_size, changes = LAYOUTS["tp2 sequence parallel"]
    settings = tiny(calculate_per_token_loss=per_token, **CHOICE, **changes)
    check(world_size, settings, unequal=True, packed=True)


@pytest.mark.parametrize("name", thinned(["one process", "pp2 chunks2"], "pp2 chunks2"))
def test_drawn_exits_learn_the_choice_of_a_last_exit_that_is_not_drawn(name):
    world_size, changes = LAYOUTS[name]
    check(world_size, tiny(exit_sampling="uniform", seed=5, **CHOICE, **changes))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(
    "name",
    thinned(
        ["one process", "tp2 sequence parallel", "pp2 chunks2", "pp2 dp2 distributed overlap own"],
        "tp2 sequence parallel",
        "pp2 chunks2",
    ),
)
def test_unequal_samples_packed_documents_and_both_loss_rules(name, per_token):
    world_size, changes = LAYOUTS[name]
    check(
        world_size,
        tiny(calculate_per_token_loss=per_token, **TAUGHT, **changes),
        unequal=True,
        packed=True,
    )


@pytest.mark.parametrize(
    ("weight", "temperature"), [(1.0, 1.0), (1.0, 3.0), (0.25, 1.0), (0.5, 0.5)]
)
@pytest.mark.parametrize("name", thinned(["one process", "pp4"], "pp4"))
def test_weights_and_temperatures(name, weight, temperature):
    world_size, changes = LAYOUTS[name]
    check(
        world_size,
        tiny(
            exit_kd_weight=weight,
            exit_kd_temperature=temperature,
            log_exit_gradients=True,
            **changes,
        ),
    )


@pytest.mark.parametrize(
    "name", ["one process", "pp2", "pp4 chunks2 8 layers own", "dp2 distributed overlap own"]
)
@pytest.mark.parametrize("drawn", thinned([1, 2], 1))
def test_drawn_exits_are_taught_even_if_the_last_is_not_drawn(name, drawn):
    world_size, changes = LAYOUTS[name]
    reports = check(
        world_size,
        tiny(exit_sampling="uniform", num_sampled_exits=drawn, seed=5, **{**TAUGHT, **changes}),
    )
    assert any(changes.get("num_layers", 4) not in c for c in reports[0]["coefficients"]), (
        "the test needs steps in which the last exit does not train"
    )


@pytest.mark.parametrize("changes", [{}, PP2])
def test_an_exit_that_does_not_train_is_not_taught(changes):
    reports = check(2, tiny(exit_layer_weight=(0.5, 0.0, 0.25), **TAUGHT, **changes))
    assert reports[0]["exits"][0].keys() == {1, 3, 4}


@pytest.mark.parametrize(
    "name",
    thinned(
        ["one process", "pp2 chunks2", "tp2 pp2 sequence parallel", "pp4"],
        "tp2 pp2 sequence parallel",
    ),
)
@pytest.mark.parametrize(
    "precision",
    [{"bf16": True}, {"fp16": True, "loss_scale": 1.0}, {"fp16": True, "loss_scale": 1024.0}],
)
def test_half_precision(name, precision):
    world_size, changes = LAYOUTS[name]
    # with a cut teacher, rounding would decide which of two almost equal tokens is kept; so it is
    # whole here
    settings, objective = tiny(**TAUGHT, **changes, **precision), Objective(mean_by_rule)
    reports = run_ranks(world_size, train_and_report, settings, 1, True, True)
    initial, _ = join_ranks([r["initial"] for r in reports])
    [losses], gradients, _ = reference_run(
        settings, initial, 1, True, True, reports[0]["coefficients"], objective
    )
    loss, gradient = (5e-3, 5e-2) if "bf16" in precision else (1e-3, 1e-2)
    for depth, numbers in reports[0]["exits"][0].items():
        assert numbers.loss == pytest.approx(losses[depth], rel=loss)
        assert numbers.kd is None or numbers.kd == pytest.approx(
            objective.kd[0][depth], rel=4 * loss, abs=loss
        )
    computed, _ = join_ranks([r["gradients"] for r in reports])
    for name, value in gradients.items():
        assert relative(computed[name], value) < gradient, (
            f"{name}: {relative(computed[name], value)}"
        )


@pytest.mark.parametrize(
    ("world_size", "changes"), [(1, {}), (2, {**PP2, **CHUNKS}), (2, {**SEQUENCE, "bf16": True})]
)
def test_a_step_does_not_wait_for_the_device_more_often(world_size, changes):
    for report in run_ranks(
        world_size, host_waits, tiny(**CUT, exit_gradient_rule="project", **changes), True, True
    ):
        assert [name for name, _ in report["step"]] == ["tolist"]


def test_evaluation_has_no_teacher():
    from tests.support.rank_bodies import evaluate_report

    plain = run_ranks(2, evaluate_report, tiny(**PP2))[0]
    taught = run_ranks(2, evaluate_report, tiny(**PP2, exit_kd_weight=0.5))[0]
    assert all(numbers.kd is None for numbers in taught["exits"].values())
    assert plain["exits"].keys() == taught["exits"].keys()


def test_gradients_of_a_share_of_zero_are_those_of_no_teacher():
    plain, taught = (
        join_ranks(
            [
                r["weights"]
                for r in run_ranks(2, train_and_report, tiny(**PP2, **more), 2, False, False)
            ]
        )[0]
        for more in ({}, {"exit_kd_weight": 1e-30})
    )
    assert all(relative(taught[name], plain[name]) < 1e-6 for name in plain)


BALCONY = {"tune_exit": True, "use_exit_block": True, "use_exit_norm": True, "exit_kd_weight": 1.0}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("one process", "distribution"),
        ("tp2 sequence parallel", "distribution"),
        ("pp2", "distribution"),
        ("pp2 chunks2", "distribution"),
        ("pp4", "distribution"),
        ("pp4 chunks2 8 layers", "distribution"),
        ("tp2 pp2 sequence parallel", "distribution"),
        ("dp2 distributed overlap", "distribution"),
        ("pp2 chunks2 dp2 distributed overlap", "distribution"),
        ("one process", "choice"),
        ("tp2 pp2 sequence parallel", "choice"),
    ],
)
def test_a_frozen_base_teaches_its_exits(name, target):
    """The frozen full model sends its hidden state and no gradient.

    Balcony's loss is the KL to its distribution.
    """
    world_size, changes = LAYOUTS[name]
    reports = check(world_size, tiny(**{**changes, **BALCONY, "exit_kd_target": target}))
    last = changes.get("num_layers", 4)
    assert all(last not in trained for trained in reports[0]["coefficients"])


@pytest.mark.parametrize("name", ["one process", "pp2", "pp4"])
def test_own_heads_on_a_frozen_base_are_taught_by_its_head(name):
    world_size, changes = LAYOUTS[name]
    check(
        world_size,
        tiny(
            **{
                **changes,
                **OWN,
                "tune_exit": True,
                "exit_kd_weight": 0.5,
                "exit_kd_temperature": 2.0,
            }
        ),
    )
