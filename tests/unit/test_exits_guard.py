"""The guard's multiplier, worked out by hand."""

import pytest

from megatron_sorted.exits.coefficients import (
    EXIT_LAYERS,
    LOSSES,
    Observation,
    Weighting,
    make_coefficient_rule,
)
from megatron_sorted.exits.guard import Guard
from megatron_sorted.exits.rules_from_losses import InverseLoss
from megatron_sorted.exits.simulated_exit import SimulatedExit


def guard(rule=None, **changes):
    options = {"last": 4, "reference": 2.0, "rate": 0.5, "decay": 0.5, "largest": 10.0, **changes}
    return Guard(rule or make_coefficient_rule((2,), 4, Weighting()), **options)


def seen(last):
    return Observation({2: 3.0, 4: last}, {2: 0.5, 4: 0.5})


def test_multiplier_rises_above_the_reference_and_falls_below():
    made = guard()
    assert made.coefficients(0) == {2: 0.5, 4: 0.5} and made.needs == {LOSSES}
    made.observe(0, seen(4.0))  # mean 4: + 0.5 * 2
    assert made.numbers() == {"guard-multiplier": 1.0}
    assert made.coefficients(1) == {2: 0.25, 4: 0.75}
    made.observe(1, seen(1.0))  # mean 2.5: + 0.25
    assert made.multiplier == 1.25
    made.observe(2, seen(0.5))  # mean 1.5: - 0.25
    assert made.multiplier == 1.0
    for step in range(3, 30):
        made.observe(step, seen(0.5))
    assert made.multiplier == 0.0 and made.coefficients(30) == {2: 0.5, 4: 0.5}


def test_the_multiplier_has_an_upper_limit():
    made = guard(largest=3.0)
    for step in range(20):
        made.observe(step, seen(9.0))
    assert made.multiplier == 3.0 and made.coefficients(20) == {2: 0.125, 4: 0.875}


def test_a_step_without_the_last_exit_changes_nothing():
    made = guard()
    made.observe(0, Observation({2: 9.0}, {2: 1.0}))
    assert made.multiplier == 0.0 and made.average is None


def test_a_list_is_not_divided():
    made = guard(make_coefficient_rule((2,), 4, Weighting(weights=(0.5,))))
    made.observe(0, seen(4.0))
    assert not made.normalised and made.coefficients(1) == {2: 0.5, 4: 2.0}


def test_state_is_restored_with_and_without_a_guard():
    made = guard(InverseLoss((2, 4), 0.9))
    made.observe(0, seen(4.0))
    again = guard(InverseLoss((2, 4), 0.9))
    again.load_state_dict(made.state_dict())
    assert again.coefficients(1) == made.coefficients(1) and again.state_dict() == made.state_dict()
    alone, guarded = InverseLoss((2, 4), 0.9), guard(InverseLoss((2, 4), 0.9))
    alone.load_state_dict(made.state_dict())
    guarded.load_state_dict(alone.state_dict())
    assert alone.average == guarded.rule.average == {2: 3.0, 4: 4.0} and guarded.multiplier == 0.0
    guarded.load_state_dict({})
    assert guarded.multiplier == 0.0


def test_the_needs_of_the_rule_below_are_passed_on():
    made = guard(SimulatedExit((2, 4), 10, 10.0, 3, 1))
    assert made.needs == {LOSSES, EXIT_LAYERS} and made.thresholds(0) == made.rule.thresholds(0)
    assert made.coefficients(0)[2] == pytest.approx(0.5)
