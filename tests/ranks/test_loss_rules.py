"""Loss rules, coefficients and selection in parallel layouts, against the reference of layouts."""

import pytest

from tests.ranks.test_layouts import compare
from tests.support.layouts import CHUNKS, DISTRIBUTED, PP2
from tests.support.tiny import tiny

WIDE = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "sequence_parallel": True,
}
PP2_CHUNKS = {**PP2, **CHUNKS}


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (2, {}),
        (2, PP2),
        (2, {"tensor_model_parallel_size": 2}),
        (4, WIDE),
        (2, PP2_CHUNKS),
        (4, {**PP2, **DISTRIBUTED}),
    ],
)
@pytest.mark.parametrize("per_token", [True, False])
def test_samples_of_unequal_length_and_packed_documents(world_size, changes, per_token):
    compare(
        world_size,
        tiny(calculate_per_token_loss=per_token, **changes),
        1e-5,
        unequal=True,
        packed=True,
    )


@pytest.mark.parametrize(("world_size", "changes"), [(1, {}), (2, PP2), (2, PP2_CHUNKS)])
def test_listed_coefficients_one_of_them_zero(world_size, changes):
    reports = compare(world_size, tiny(exit_layer_weight=(0.5, 0.0, 0.25), **changes), 1e-5)
    assert reports[0]["losses"][0].keys() == {1, 3, 4}


@pytest.mark.parametrize(("world_size", "changes"), [(2, PP2), (2, {**PP2_CHUNKS})])
def test_warm_up_of_coefficients(world_size, changes):
    settings = tiny(
        exit_layer_weight_rule="linear",
        exit_layer_weight_init=(1.0, 0.5, 0.0),
        exit_layer_weight_warmup_iters=4,
        **changes,
    )
    reports = compare(world_size, settings, 1e-5)
    assert reports[0]["coefficients"][2] == pytest.approx({1: 0.55, 2: 0.35, 3: 0.15, 4: 0.4})


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (2, {}),
        (2, {"overlap_grad_reduce": True}),
        (2, PP2),
        (4, WIDE),
        (2, PP2_CHUNKS),
        (
            4,
            {
                **PP2,
                **DISTRIBUTED,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
                "untie_embeddings_and_output_weights": True,
            },
        ),
    ],
)
def test_exits_drawn_at_each_step(world_size, changes):
    reports = compare(
        world_size, tiny(exit_sampling="uniform", num_sampled_exits=1, seed=5, **changes), 1e-5
    )
    drawn = [set(c) for c in reports[0]["coefficients"]]
    assert all(report["coefficients"] == reports[0]["coefficients"] for report in reports)
    assert all(len(d) == 1 for d in drawn)
    assert {4} not in drawn[:1], (
        "the first draw must leave upper layers out, or the test shows little"
    )


def test_no_exits_but_the_last():
    compare(2, tiny(exit_layer_nums=(), **PP2), 1e-5)


def test_plain_run_of_a_nested_model_trains_the_last_exit_only():
    reports = compare(2, tiny(exit_layer_weight=(0.0, 0.0, 0.0), **PP2), 1e-5)
    assert reports[0]["losses"][0].keys() == {4}
