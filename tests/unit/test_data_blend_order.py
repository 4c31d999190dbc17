"""The order of a blend against a plain simulation from the first sample.

Each source stays within one sample of its share.
"""

import random
from fractions import Fraction

import pytest

from megatron_sorted.data.samples import blend_order
from megatron_sorted.data.samples.blend_order import BlendOrder, whole_parts


def walk(parts, num_samples):
    """Yield (source, counts before) slot by slot, by the textbook: the earliest deadline first."""
    shares, counts = [Fraction(part, sum(parts)) for part in parts], [0] * len(parts)
    for slot in range(num_samples):
        allowed = [i for i in range(len(parts)) if counts[i] < (slot + 1) * shares[i]]
        due = {i: -(-(counts[i] + 1) // shares[i]) for i in allowed}
        source = min(allowed, key=lambda i: (due[i], i))
        yield source, list(counts)
        counts[source] += 1


def weights(case):
    """Return random weights of four kinds."""
    rng = random.Random(case)
    count = rng.choice([1, 2, 3, 5, 9])
    return [
        [rng.randint(1, 12) for _ in range(count)],
        [round(rng.uniform(0.001, 1), 9) for _ in range(count)],
        [10 ** -rng.uniform(0, 3) for _ in range(count)],
        [1.0] * count + [40.0] * 2,
    ][case % 4]


def test_weights_are_read_as_decimals():
    assert (
        whole_parts([0.3, 0.7]) == [3, 7]
        and whole_parts([0.1, 0.2, 0.7]) == [1, 2, 7]
        and whole_parts([5]) == [1]
    )
    assert whole_parts([2e-3, 1]) == [1, 500] and whole_parts([30, 70]) == [3, 7]
    assert whole_parts([0.123456789, 0.876543211]) == [123456789, 876543211]
    rounded = whole_parts([1 / 3, 2 / 3, 1 / 7])
    assert sum(rounded) == 10**9 and abs(rounded[2] - 10**9 / 8) < 1


def test_three_to_seven_by_hand():
    # due: A's first by slot 4, B's by 2, 3, 5 (its third may not be given before slot 2), then A's
    # first, ...
    assert [BlendOrder([0.3, 0.7]).locate(i) for i in range(11)] == [
        (1, 0),
        (1, 1),
        (0, 0),
        (1, 2),
        (1, 3),
        (0, 1),
        (1, 4),
        (1, 5),
        (0, 2),
        (1, 6),
        (1, 7),
    ]
    assert [BlendOrder([1, 1]).locate(i)[0] for i in range(6)] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("period", ["short", "long"])
@pytest.mark.parametrize("case", range(12))
def test_order_is_that_of_the_walk_and_within_one_sample(monkeypatch, case, period):
    if period == "long":  # no repetition known: blocks of 64, each found by itself
        monkeypatch.setattr(blend_order, "LONGEST_PERIOD", 0)
        monkeypatch.setattr(blend_order, "BLOCK", 64)
    order = BlendOrder(weights(case))
    parts, total = order.parts, order.total
    for index, (source, counts) in enumerate(walk(parts, 200)):
        assert order.counts(index) == counts
        assert order.locate(index) == (source, counts[source])
        assert all(
            abs(count * total - index * part) < total
            for count, part in zip(counts, parts, strict=True)
        )
    backwards = [order.locate(index) for index in reversed(range(200))]
    fresh = BlendOrder(weights(case))
    assert backwards[::-1] == [fresh.locate(index) for index in range(200)]


def test_choosing_the_source_furthest_behind_exceeds_one_sample():
    """The usual greedy rule, on the weights of the module's docstring, is not good enough."""
    parts, worst = [1] * 6 + [20] * 2, 0
    total, counts = sum(parts), [0] * 8
    for n in range(1, total + 1):
        behind = [
            part * max(n - 1, 1) - count * total for part, count in zip(parts, counts, strict=True)
        ]
        counts[behind.index(max(behind))] += 1
        worst = max(
            worst,
            *(abs(count * total - part * n) for part, count in zip(parts, counts, strict=True)),
        )
    assert round(worst / total, 2) == 1.48


@pytest.mark.parametrize("first", [0, 10**9 - 7, 10**12 + 12345])
def test_long_after_the_start(first):
    rng = random.Random(first)
    order = BlendOrder([0.123456789, 0.5, 1e-4, *(rng.random() for _ in range(5))])
    counts = order.counts(first)
    assert sum(counts) == first
    for index in range(first, first + 9000):  # over block borders
        source, number = order.locate(index)
        assert number == counts[source]
        counts[source] += 1
        if index % 97 == 0:
            assert order.counts(index + 1) == counts
            assert all(
                abs(c * order.total - (index + 1) * part) < order.total
                for c, part in zip(counts, order.parts, strict=True)
            )


def test_a_source_of_one_sample_in_a_million():
    order = BlendOrder([1e-6, 1 - 1e-6])
    assert [order.counts(n)[0] for n in (0, 10**6, 2 * 10**6, 10**9, 10**12)] == [
        0,
        1,
        2,
        1000,
        10**6,
    ]
    given = order.counts(10**9 + 500_000)[0]
    assert given in (1000, 1001) and order.locate(10**9 + 999_999) in (
        (0, 1000),
        (1, 10**9 + 10**6 - 1001 - 1),
    )
