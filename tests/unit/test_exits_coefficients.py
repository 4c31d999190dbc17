"""Coefficients of exits, against tables worked out by hand."""

import math

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.exits.coefficients import (
    DEPTH_RULES,
    Observation,
    Weighting,
    make_coefficient_rule,
)

TABLE = {
    "uniform": {1: 1 / 3, 4: 1 / 3, 9: 1 / 3},
    "linear": {1: 1 / 14, 4: 4 / 14, 9: 9 / 14},
    "sum": {1: 1 / 56, 4: 10 / 56, 9: 45 / 56},
    "sqrt": {1: 1 / 6, 4: 2 / 6, 9: 3 / 6},
    "inverse": {1: 36 / 49, 4: 9 / 49, 9: 4 / 49},
    "inverse_sqrt": {1: 6 / 11, 4: 3 / 11, 9: 2 / 11},
}


def test_every_rule_has_a_row():
    assert set(TABLE) == set(DEPTH_RULES)


@pytest.mark.parametrize("rule", TABLE)
def test_a_rule_of_depth_gives_its_table(rule):
    made = make_coefficient_rule((1, 4), 9, Weighting(rule))
    assert made.normalised
    for step in (0, 1, 1000):
        assert made.coefficients(step) == pytest.approx(TABLE[rule], abs=1e-15)


def test_layerskips_rule_is_quadratic_and_the_last_layer_counts_fully():
    # layers 0..8: below the last 0.5 * (0, 1, 3, 6, 10, 15, 21, 28),
    # the last 8 + 0.5 * (0 + ... + 7) = 22
    made = make_coefficient_rule((1, 4, 6), 9, Weighting("layerskip", scale=0.5))
    assert made.coefficients(0) == pytest.approx(
        {1: 0.0, 4: 3 / 32.5, 6: 7.5 / 32.5, 9: 22 / 32.5}, abs=1e-15
    )
    assert make_coefficient_rule((), 1, Weighting("layerskip")).coefficients(0) == {1: 1.0}
    assert make_coefficient_rule((), 2, Weighting("layerskip", scale=0.2)).coefficients(0) == {
        2: 1.0
    }


def test_a_list_is_used_as_given_and_the_last_counts_one():
    made = make_coefficient_rule((2, 4), 8, Weighting(weights=(0.1, 0.2)))
    assert made.coefficients(0) == {2: 0.1, 4: 0.2, 8: 1.0}
    assert not made.normalised
    assert make_coefficient_rule((2, 4), 8, Weighting(weights=(0.1, 0.0, 3.0))).coefficients(7) == {
        2: 0.1,
        4: 0.0,
        8: 3.0,
    }
    assert make_coefficient_rule((4, 2), 8, Weighting(weights=(0.1, 0.2))).coefficients(7) == {
        4: 0.1,
        2: 0.2,
        8: 1.0,
    }


@pytest.mark.parametrize(
    ("style", "parts"),
    [
        ("linear", [0, 0.25, 0.5, 0.75, 1, 1]),
        ("cosine", [0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1, 1]),
    ],
)
def test_intermediate_exits_warm_up_from_zero(style, parts):
    made = make_coefficient_rule(
        (2, 4), 8, Weighting(weights=(0.4, 0.8), warmup_iters=4, warmup_style=style)
    )
    for step, part in enumerate(parts):
        assert made.coefficients(step) == pytest.approx(
            {2: 0.4 * part, 4: 0.8 * part, 8: 1.0}, abs=1e-15
        )


def test_a_warm_up_may_start_above_and_may_move_the_last():
    made = make_coefficient_rule((2,), 4, Weighting(weights=(0.2,), initial=(1.0,), warmup_iters=2))
    assert [made.coefficients(step) for step in range(3)] == [
        {2: 1.0, 4: 1.0},
        {2: pytest.approx(0.6), 4: 1.0},
        {2: 0.2, 4: 1.0},
    ]
    made = make_coefficient_rule((2,), 4, Weighting("linear", initial=(0.5, 0.5), warmup_iters=2))
    assert made.coefficients(0) == {2: 0.5, 4: 0.5}
    assert made.coefficients(1) == pytest.approx({2: (0.5 + 1 / 3) / 2, 4: (0.5 + 2 / 3) / 2})
    assert made.coefficients(2) == pytest.approx({2: 1 / 3, 4: 2 / 3})


def test_a_fixed_rule_has_no_state():
    made = make_coefficient_rule((2,), 4, Weighting())
    made.observe(0, Observation({2: 3.0, 4: 2.0}, {2: 0.5, 4: 0.5}))
    assert made.needs == frozenset() and made.thresholds(0) == () and made.numbers() == {}
    assert made.state_dict() == {}
    assert made.coefficients(1) == {2: 0.5, 4: 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (0.1,)}, "--exit-layer-weight: 1 values for 3 exits"),
        ({"weights": (0.1, -0.2)}, "--exit-layer-weight: -0.2 is negative"),
        ({"weights": (0.0, 0.0, 0.0)}, "--exit-layer-weight: every coefficient is 0"),
        ({"initial": (0.1,), "warmup_iters": 2}, "--exit-layer-weight-init: 1 values"),
        ({"initial": (-1.0, 0.1), "warmup_iters": 2}, "--exit-layer-weight-init: -1.0 is negative"),
        (
            {"initial": (0.0, 0.0, 0.0), "warmup_iters": 2},
            "--exit-layer-weight-init: every coefficient is 0",
        ),
        ({"initial": (0.1, 0.1)}, "no effect without a warm-up"),
    ],
)
def test_lists_that_cannot_be_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        make_coefficient_rule((2, 4), 8, Weighting(**options))
