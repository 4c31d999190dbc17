"""Gradient rules equal plain PyTorch, whose autograd function joins the same two gradients."""

import pytest

from megatron_sorted.settings.run import Settings
from tests.ranks.test_layouts import compare, mean_by_rule
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
    pairwise,
    thinned,
)
from tests.support.measure_bodies import measure
from tests.support.ranks import run_ranks
from tests.support.taught import Objective
from tests.support.tiny import tiny

OWN_UNTIED = {**OWN, **UNTIED}
LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, TP2),
    "tp2 sequence parallel": (2, SEQUENCE),
    "pp2": (2, PP2),
    "pp2 own untied": (2, {**PP2, **OWN_UNTIED}),
    "pp2 chunks2": (2, {**PP2, **CHUNKS}),
    "pp4": (4, PP4),
    "pp4 chunks2 8 layers": (4, {**PP4, **CHUNKS, **DEEP}),
    "tp2 pp2 sequence parallel": (4, {**SEQUENCE, **PP2}),
    "dp2 distributed overlap": (2, OVERLAP),
}
FEW = ["one process", "tp2 sequence parallel", "pp4 chunks2 8 layers", "tp2 pp2 sequence parallel"]
WHOLE = {"exit_gradient_scope": "micro-batch"}


def check(world_size: int, settings: Settings, **options) -> list[dict]:
    """Compare a layout and its measured gradients with plain PyTorch; return the ranks' reports."""
    objective = Objective(mean_by_rule)
    settings = tiny(**{**vars(settings), "log_exit_gradients": True})
    reports = compare(world_size, settings, 1e-5, objective=objective, **options)
    for step, meetings in enumerate(objective.meetings):
        exits = reports[0]["exits"][step]
        assert {
            depth for depth, numbers in exits.items() if numbers.gradient_cosine is not None
        } == meetings.keys()
        for depth, (cosine, ratio) in meetings.items():
            assert exits[depth].gradient_cosine == pytest.approx(cosine, abs=2e-6), (
                f"cosine at exit {depth}, step {step}"
            )
            assert exits[depth].gradient_ratio == pytest.approx(ratio, rel=1e-5), (
                f"ratio at exit {depth}, step {step}"
            )
    return reports


@pytest.mark.parametrize("name", pairwise(LAYOUTS))
def test_projection(name):
    world_size, changes = LAYOUTS[name]
    check(world_size, tiny(exit_gradient_rule="project", **changes))


@pytest.mark.parametrize(
    "rule",
    [
        {"exit_gradient_rule": "sum"},
        {"exit_gradient_rule": "equilibrium"},
        {"exit_gradient_rule": "balance"},
        {"exit_gradient_rule": "balance", "exit_gradient_balance": 0.3, **WHOLE},
    ],
)
@pytest.mark.parametrize("name", thinned(FEW, "tp2 sequence parallel", "pp4 chunks2 8 layers"))
def test_other_rules(name, rule):
    world_size, changes = LAYOUTS[name]
    check(world_size, tiny(**rule, **changes))


@pytest.mark.parametrize("name", FEW)
def test_projection_over_the_micro_batch(name):
    world_size, changes = LAYOUTS[name]
    check(world_size, tiny(exit_gradient_rule="project", **WHOLE, **changes))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(
    "rule", [{"exit_gradient_rule": "project"}, {"exit_gradient_rule": "balance", **WHOLE}]
)
@pytest.mark.parametrize(
    "name",
    thinned(
        ["one process", "tp2 pp2 sequence parallel", "dp2 distributed overlap"],
        "tp2 pp2 sequence parallel",
    ),
)
def test_unequal_samples_packed_documents_and_both_loss_rules(name, rule, per_token):
    world_size, changes = LAYOUTS[name]
    check(
        world_size,
        tiny(calculate_per_token_loss=per_token, **rule, **changes),
        unequal=True,
        packed=True,
    )


@pytest.mark.parametrize("name", thinned(["one process", "pp2"], "pp2"))
@pytest.mark.parametrize("rule", ["equilibrium", "balance", "project"])
def test_drawn_exits(name, rule):
    world_size, changes = LAYOUTS[name]
    check(
        world_size,
        tiny(
            exit_gradient_rule=rule, exit_sampling="uniform", num_sampled_exits=2, seed=7, **changes
        ),
    )


@pytest.mark.parametrize("name", ["pp2 own untied", "pp4", "tp2 pp2 sequence parallel"])
def test_with_a_teacher(name):
    world_size, changes = LAYOUTS[name]
    check(
        world_size,
        tiny(exit_gradient_rule="project", exit_kd_weight=0.5, exit_kd_temperature=2.0, **changes),
    )


@pytest.mark.parametrize(
    "rule", [{"exit_gradient_rule": "project"}, {"exit_gradient_rule": "balance", **WHOLE}]
)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_loss_scale_leaves_no_trace(rule, scale):
    from tests.ranks.test_layouts import relative
    from tests.support.gather import join_ranks
    from tests.support.rank_bodies import train_and_report

    half, exact = (
        join_ranks(
            [
                r["gradients"]
                for r in run_ranks(2, train_and_report, tiny(**PP2, **rule, **more), 1, True, True)
            ]
        )[0]
        for more in ({"fp16": True, "loss_scale": scale}, {})
    )
    for name in exact:
        assert relative(half[name], exact[name]) < 1e-2, (
            f"{name}: {relative(half[name], exact[name])}"
        )


@pytest.mark.parametrize(
    ("changes", "rule", "added"),
    [
        (TP2, {"exit_gradient_rule": "project", **WHOLE}, 0),  # every rank holds every token
        (SEQUENCE, {"exit_gradient_rule": "project"}, 0),
        (SEQUENCE, {"exit_gradient_rule": "equilibrium"}, 0),
        (SEQUENCE, {"exit_gradient_rule": "balance", **WHOLE}, 3 * 4),
    ],
)  # three exits below the last, four micro-batches
def test_only_a_micro_batch_split_over_ranks_needs_a_message(changes, rule, added):
    plain, ruled = (
        run_ranks(2, measure, tiny(**changes, **more), 1, False, False, False)[0]["collectives"][0]
        for more in ({}, rule)
    )
    difference = {name: ruled[name] - count for name, count in plain.items()}
    assert difference.pop("all_reduce") == added and not any(difference.values())
