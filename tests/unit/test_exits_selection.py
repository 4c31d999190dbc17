"""Which exits train at a step."""

from collections import Counter
from itertools import permutations

import pytest

from megatron_sorted.exits.selection import ExitSampling, select_exits

DEPTHS = (2, 4, 6, 8)
COEFFICIENTS = {2: 0.1, 4: 0.2, 6: 0.3, 8: 0.4}
PROBABILITIES = {2: 0.1, 4: 0.2, 6: 0.3, 8: 0.4}


def exact(probabilities, num):
    """Return the probability of each set of ``num`` depths, by enumerating every order of draws."""
    chances = Counter()
    for order in permutations(probabilities, num):
        chance, left = 1.0, 1.0
        for depth in order:
            chance *= probabilities[depth] / left
            left -= probabilities[depth]
        chances[tuple(sorted(order))] += chance
    return chances


def test_all_exits_train_with_their_coefficients_except_those_at_zero():
    assert select_exits(3, COEFFICIENTS, ExitSampling(1)) == COEFFICIENTS
    assert select_exits(3, {**COEFFICIENTS, 4: 0.0}, ExitSampling(1)) == {2: 0.1, 6: 0.3, 8: 0.4}


@pytest.mark.parametrize(
    ("sampling", "num"),
    [
        ("uniform", 1),
        ("uniform", 2),
        ("probabilities", 1),
        ("probabilities", 2),
        ("probabilities", 3),
    ],
)
def test_draws_are_as_frequent_as_they_should_be(sampling, num):
    steps = 20_000
    counts = Counter(
        tuple(select_exits(step, COEFFICIENTS, ExitSampling(7, sampling, num, PROBABILITIES)))
        for step in range(steps)
    )
    chances = exact(
        PROBABILITIES if sampling == "probabilities" else dict.fromkeys(DEPTHS, 0.25), num
    )
    assert sum(chances.values()) == pytest.approx(1)
    assert set(counts) == set(chances)
    for drawn, chance in chances.items():
        assert abs(counts[drawn] / steps - chance) < 4.5 * (chance * (1 - chance) / steps) ** 0.5


def test_coefficients_of_drawn_exits_are_scaled_to_one_only_for_normalised_rules():
    for step in range(20):
        (alone,) = select_exits(step, COEFFICIENTS, ExitSampling(1, "uniform", 1)).values()
        assert alone == 1.0
        three = select_exits(step, COEFFICIENTS, ExitSampling(1, "uniform", 3))
        assert three == pytest.approx(
            {depth: COEFFICIENTS[depth] / sum(COEFFICIENTS[d] for d in three) for depth in three}
        )
        given = select_exits(step, COEFFICIENTS, ExitSampling(1, "uniform", 3), normalised=False)
        assert given == {depth: COEFFICIENTS[depth] for depth in three}


def test_an_exit_at_zero_is_never_drawn():
    for step in range(200):
        assert 2 not in select_exits(step, {**COEFFICIENTS, 2: 0.0}, ExitSampling(1, "uniform", 2))
        assert 8 not in select_exits(
            step,
            COEFFICIENTS,
            ExitSampling(1, "probabilities", 1, {2: 0.5, 4: 0.3, 6: 0.2, 8: 0.0}),
        )


def test_fewer_train_where_fewer_can_be_drawn():
    assert select_exits(0, {2: 0.0, 4: 0.0, 6: 0.0, 8: 0.4}, ExitSampling(1, "uniform", 2)) == {
        8: 1.0
    }


def test_draws_depend_on_step_and_seed_alone():
    drawn = [
        tuple(select_exits(step, COEFFICIENTS, ExitSampling(1234, "uniform", 2)))
        for step in range(8)
    ]
    assert drawn == GOLDEN
    assert [
        tuple(select_exits(step, COEFFICIENTS, ExitSampling(1234, "uniform", 2)))
        for step in reversed(range(8))
    ] == GOLDEN[::-1]
    assert drawn != [
        tuple(select_exits(step, COEFFICIENTS, ExitSampling(1235, "uniform", 2)))
        for step in range(8)
    ]


GOLDEN = [(4, 6), (4, 8), (2, 6), (6, 8), (4, 8), (4, 6), (2, 6), (2, 6)]
"""Draws recorded from other code: others would make resumed runs differ from unbroken ones."""


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_drawn_by_coefficients_the_mean_of_what_counts_is_the_coefficients(num):
    """With shares above 1 / num too: such an exit is drawn every time, sometimes twice."""
    coefficients, steps = {2: 0.05, 4: 0.15, 6: 0.2, 8: 0.6}, 20_000
    total = dict.fromkeys(coefficients, 0.0)
    for step in range(steps):
        drawn = select_exits(step, coefficients, ExitSampling(7, "coefficients", num))
        assert sum(drawn.values()) == pytest.approx(1) and list(drawn) == sorted(drawn)
        for depth, coefficient in drawn.items():
            times = coefficient * num
            assert (
                times == pytest.approx(round(times)) and abs(times - num * coefficients[depth]) < 1
            )
            total[depth] += coefficient
    for depth, coefficient in coefficients.items():
        assert total[depth] / steps == pytest.approx(coefficient, abs=4.5 * (0.25 / steps) ** 0.5)


def test_a_list_drawn_by_coefficients_keeps_its_sum_and_zeros_stay_out():
    for step in range(100):
        drawn = select_exits(
            step,
            {2: 0.0, 4: 0.5, 6: 0.0, 8: 1.5},
            ExitSampling(7, "coefficients", 2),
            normalised=False,
        )
        assert sum(drawn.values()) == pytest.approx(2.0) and drawn.keys() <= {4, 8}
    assert select_exits(
        0, {2: 0.0, 4: 0.0, 6: 0.0, 8: 1.0}, ExitSampling(7, "coefficients", 3)
    ) == {8: 1.0}
    for step in range(100):  # rounding of the sum of many shares loses no draw
        assert sum(
            select_exits(
                step, dict.fromkeys(range(1, 8), 1 / 7), ExitSampling(7, "coefficients", 7)
            ).values()
        ) == pytest.approx(1)
