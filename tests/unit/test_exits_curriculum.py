"""Which exits count at a step, written out."""

import pytest

from megatron_sorted.exits.coefficients import Observation, Weighting, make_coefficient_rule
from megatron_sorted.exits.curriculum import Curriculum, gradual, rotation
from megatron_sorted.exits.rules_from_losses import InverseLoss

DEPTHS = (2, 4, 6, 8)


def test_rotation_moves_on_by_one_and_keeps_the_last():
    assert [rotation(DEPTHS, 3)(step) for step in range(4)] == [{2, 8}, {4, 8}, {6, 8}, {2, 8}]
    assert [rotation(DEPTHS, 2)(step) for step in range(3)] == [{2, 6, 8}, {4, 8}, {2, 6, 8}]
    assert rotation(DEPTHS, 1)(7) == set(DEPTHS)
    assert [rotation(DEPTHS, 5)(step) for step in range(5)] == [{2, 8}, {4, 8}, {6, 8}, {8}, {8}]
    assert rotation((8,), 1)(0) == {8}


def test_gradual_goes_down_from_the_last():
    on = gradual(DEPTHS, 20)
    assert [sorted(on(step)) for step in (0, 4, 5, 9, 10, 14, 15, 1000)] == [
        [8],
        [8],
        [6, 8],
        [6, 8],
        [4, 6, 8],
        [4, 6, 8],
        [2, 4, 6, 8],
        [2, 4, 6, 8],
    ]
    assert gradual(DEPTHS, 0)(0) == set(DEPTHS)


def test_shares_are_divided_again_and_a_list_is_not():
    shares = Curriculum(
        make_coefficient_rule((2, 4, 6), 8, Weighting("linear")), rotation(DEPTHS, 3)
    )
    assert shares.coefficients(1) == pytest.approx({2: 0.0, 4: 1 / 3, 6: 0.0, 8: 2 / 3})
    listed = Curriculum(
        make_coefficient_rule((2, 4, 6), 8, Weighting(weights=(0.1, 0.2, 0.3))), rotation(DEPTHS, 3)
    )
    assert listed.coefficients(1) == {2: 0.0, 4: 0.2, 6: 0.0, 8: 1.0}


def test_the_rule_below_learns_from_those_that_are_on():
    made = Curriculum(InverseLoss(DEPTHS, 0.9), gradual(DEPTHS, 4))
    made.observe(0, Observation({8: 1.0}, {8: 1.0}))
    made.observe(1, Observation({6: 3.0, 8: 1.0}, {6: 0.5, 8: 0.5}))
    assert made.coefficients(1) == pytest.approx({2: 0.0, 4: 0.0, 6: 0.25, 8: 0.75})
    again = Curriculum(InverseLoss(DEPTHS, 0.9), gradual(DEPTHS, 4))
    again.load_state_dict(made.state_dict())
    assert again.coefficients(3) == made.coefficients(3)
    assert made.normalised and made.needs and made.numbers() == {} and made.thresholds(0) == ()
