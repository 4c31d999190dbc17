"""Rules that learn, against tables worked out by hand."""

import math

import pytest

from megatron_sorted.exits.coefficients import EXIT_LAYERS, GRADIENTS, LOSSES, Observation
from megatron_sorted.exits.gradient_norm import GradNorm
from megatron_sorted.exits.rules_from_losses import ExcessLoss, InverseLoss, LossRatio, Uncertainty
from megatron_sorted.exits.simulated_exit import SimulatedExit

DEPTHS = (2, 4)
EQUAL = {2: 0.5, 4: 0.5}
MADE = {
    "uncertainty": lambda: Uncertainty(DEPTHS, 0.5, 1.0),
    "inverse_loss": lambda: InverseLoss(DEPTHS, 0.75),
    "dwa": lambda: LossRatio(DEPTHS, 2, 2.0),
    "gradnorm": lambda: GradNorm(DEPTHS, 0.1, 1.0),
    "simulated_exit": lambda: SimulatedExit(DEPTHS, 10, 10.0, 3, 1),
    "excess_loss": lambda: ExcessLoss(DEPTHS, {2: 3.0, 4: 2.0}, 0.5, 0.1),
}


def observation(losses, **more):
    return Observation(losses, EQUAL, **more)


def test_uncertainty_takes_gradient_steps():
    rule = MADE["uncertainty"]()
    assert rule.coefficients(0) == EQUAL and rule.needs == {LOSSES}
    rule.observe(0, observation({2: 3.0, 4: 2.0}))
    # s <- 0 - 0.5 (1 - L) / 2
    assert rule.uncertainty == pytest.approx({2: 0.5, 4: 0.25})
    shallow, deep = math.exp(-0.5), math.exp(-0.25)
    assert rule.coefficients(1) == pytest.approx(
        {2: shallow / (shallow + deep), 4: deep / (shallow + deep)}
    )
    rule.observe(1, observation({2: 3.0, 4: 2.0}))
    assert rule.uncertainty[2] == pytest.approx(0.5 - 0.25 * (1 - 3 * math.exp(-0.5)))
    for step in range(2, 300):
        rule.observe(step, observation({2: 3.0, 4: 2.0}))
    assert rule.coefficients(300) == pytest.approx({2: 0.4, 4: 0.6})  # at rest 1 / L


def test_inverse_loss_follows_a_moving_mean():
    rule = MADE["inverse_loss"]()
    assert rule.coefficients(0) == EQUAL
    rule.observe(0, observation({2: 3.0, 4: 1.0}))
    assert rule.coefficients(1) == pytest.approx({2: 0.25, 4: 0.75})
    rule.observe(1, observation({2: 1.0, 4: 1.0}))
    assert rule.average == pytest.approx({2: 2.5, 4: 1.0})
    assert rule.coefficients(2) == pytest.approx({2: 2 / 7, 4: 5 / 7})


def test_inverse_loss_of_an_exit_never_seen_is_the_mean():
    rule = InverseLoss((2, 4, 6), 0.9)
    rule.observe(0, observation({2: 3.0, 6: 1.0}))
    assert rule.coefficients(1) == pytest.approx({2: 2 / 11, 4: 3 / 11, 6: 6 / 11})


def test_dwa_compares_two_windows():
    rule = MADE["dwa"]()
    for step, losses in enumerate(
        ({2: 4.0, 4: 4.0}, {2: 2.0, 4: 2.0}, {2: 2.0, 4: 1.0}, {2: 4.0, 4: 2.0})
    ):
        assert rule.coefficients(step) == EQUAL
        rule.observe(step, observation(losses))
    # window means 3, 3 and then 3, 1.5: r = 1 and 0.5, temperature 2
    shallow, deep = math.exp(0.5), math.exp(0.25)
    assert rule.coefficients(4) == pytest.approx(
        {2: shallow / (shallow + deep), 4: deep / (shallow + deep)}
    )
    rule.observe(4, observation({2: 1.0}))
    rule.observe(5, observation({2: 1.0}))  # 4 did not train: it counts as unchanged
    assert rule.coefficients(6) == pytest.approx(
        {
            2: math.exp(1 / 6) / (math.exp(1 / 6) + math.exp(0.5)),
            4: math.exp(0.5) / (math.exp(1 / 6) + math.exp(0.5)),
        }
    )


def test_gradnorm_pulls_norms_together():
    rule = MADE["gradnorm"]()
    assert rule.needs == {LOSSES, GRADIENTS} and rule.coefficients(0) == EQUAL
    # coefficient 1 would give norms 6 and 2; G / mean = 1.5 and 0.5, targets 1: pull 1.5 and -0.5,
    # their sum 1, half of it to each
    rule.observe(0, observation({2: 4.0, 4: 2.0}, grad_norms={2: 3.0, 4: 1.0}))
    assert rule.scores == pytest.approx({2: -0.1, 4: 0.1})
    share = 1 / (1 + math.exp(0.2))
    assert rule.coefficients(1) == pytest.approx({2: share, 4: 1 - share})
    # the shallow exit has learned nothing, the deep one half: targets 4/3 and 2/3; equal norms
    rule.scores = {2: 0.0, 4: 0.0}
    rule.observe(1, observation({2: 4.0, 4: 1.0}, grad_norms={2: 1.0, 4: 1.0}))
    assert rule.scores == pytest.approx({2: 0.1, 4: -0.1})


def test_gradnorm_leaves_alone_what_it_cannot_compare():
    rule = GradNorm((2, 4, 6), 0.1, 1.5)
    rule.observe(0, Observation({4: 2.0}, {4: 1.0}, {4: 5.0}))
    assert rule.scores == {2: 0.0, 4: 0.0, 6: 0.0} and rule.first_losses == {4: 2.0}
    rule.observe(1, Observation({4: 2.0, 6: 2.0}, {4: 0.5, 6: 0.5}, {4: 3.0, 6: 1.0}))
    assert rule.scores == pytest.approx({2: 0.0, 4: -0.1, 6: 0.1})


def test_excess_loss_raises_whoever_is_furthest_from_its_reference():
    rule = MADE["excess_loss"]()
    rule.observe(
        0, observation({2: 5.0, 4: 2.0})
    )  # excess 2 and 0: e^1 to 1, then a tenth of equal shares
    share = math.e / (math.e + 1)
    assert rule.coefficients(1) == pytest.approx(
        {2: 0.9 * share + 0.05, 4: 0.9 * (1 - share) + 0.05}
    )
    before = rule.coefficients(1)
    rule.observe(
        1, observation({2: 1.0, 4: 1.5})
    )  # both better than their references: only smoothing
    assert rule.coefficients(2) == pytest.approx(
        {depth: 0.9 * value + 0.05 for depth, value in before.items()}
    )


def test_simulated_exit_spreads_the_shares_over_near_exits():
    rule = SimulatedExit((2, 4, 6), 10, 4.0, 2, 1)
    assert rule.needs == {LOSSES, EXIT_LAYERS}
    assert rule.coefficients(0) == pytest.approx({2: 1 / 3, 4: 1 / 3, 6: 1 / 3})
    rule.observe(
        0, observation({2: 1.0}, exit_shares={2: 0.5, 4: 0.0, 6: 0.5}, confidences=(0.2, 0.6))
    )
    # b = 4 * 5 / 10 = 2: from an end e^0, e^-2, e^-4
    whole = 1 + math.exp(-2) + math.exp(-4)
    end = (1 + math.exp(-4)) / whole / 2
    end = (1 + math.exp(-4)) / whole / 2
    assert rule.coefficients(5) == pytest.approx({2: end, 4: math.exp(-2) / whole, 6: end})
    assert rule.coefficients(10)[4] < 0.02
    assert rule.coefficients(99) == rule.coefficients(10)


def test_thresholds_lie_in_the_range_of_the_step_before_and_differ_by_step():
    rule = SimulatedExit((2, 4), 10, 4.0, 5, 1)
    rule.observe(0, observation({2: 1.0}, exit_shares={2: 1.0, 4: 0.0}, confidences=(0.2, 0.6)))
    first, second = rule.thresholds(1), rule.thresholds(2)
    assert len(first) == 5 and list(first) == sorted(first) and first != second
    assert all(0.2 <= threshold < 0.6 for threshold in (*first, *second))
    assert first == rule.thresholds(1)
    many = sorted(threshold for step in range(400) for threshold in rule.thresholds(step))
    assert sum(many) / len(many) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("name", MADE)
def test_coefficients_sum_to_one_and_state_is_restored(name):
    rule = MADE[name]()
    assert rule.name == name and rule.normalised
    for step in range(7):
        losses, norms = {2: 3.0 / (step + 1), 4: 2.0}, {2: 1.0, 4: 0.5 + step}
        rule.observe(
            step,
            observation(
                losses, grad_norms=norms, exit_shares={2: 0.3, 4: 0.7}, confidences=(0.1, 0.5)
            ),
        )
        assert sum(rule.coefficients(step + 1).values()) == pytest.approx(1, abs=1e-12)
        resumed = MADE[name]()
        resumed.load_state_dict(rule.state_dict())
        assert resumed.coefficients(step + 1) == rule.coefficients(step + 1)
        assert resumed.state_dict() == rule.state_dict() and resumed.thresholds(
            step + 1
        ) == rule.thresholds(step + 1)
    fresh = MADE[name]()
    fresh.load_state_dict({})
    fresh.load_state_dict({**rule.state_dict(), "rule": "another"})
    assert fresh.coefficients(0) == pytest.approx(EQUAL)


def test_a_state_of_other_exits_is_taken_where_they_are_the_same():
    before, after = InverseLoss((2, 4), 0.9), InverseLoss((4, 6), 0.9)
    before.observe(0, observation({2: 3.0, 4: 1.0}))
    after.load_state_dict(before.state_dict())
    assert after.average == {4: 1.0}
    simulated = SimulatedExit((4, 6), 10, 10.0, 3, 1)
    simulated.load_state_dict(
        {"rule": "simulated_exit", "shares": {"2": 0.9, "4": 0.1}, "lowest": 0.1, "highest": 0.2}
    )
    assert simulated.shares == {4: 0.5, 6: 0.5}
