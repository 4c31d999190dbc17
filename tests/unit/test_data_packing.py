"""Packing: layouts made by hand, a brute-force reference, and the guarantees of an epoch."""

import numpy as np
import pytest

from megatron_sorted.data.samples import packing
from megatron_sorted.data.samples.packing import (
    assign_epoch,
    best_fit_decreasing,
    lay_out,
    lower_bound,
    shuffled,
)


def first_fit_decreasing(lengths, capacity):
    """Return the number of windows of the textbook method, quadratic."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        for window, room in enumerate(rooms):
            if room >= length:
                rooms[window] -= length
                break
        else:
            rooms.append(capacity - length)
    return len(rooms)


def test_by_hand():
    # 10: longest first 7, 6, 4, 3, then 2 goes where it fits tightest: windows {7, 3}, {6, 4}, {2}.
    layout = lay_out(np.array([2, 3, 4, 6, 7]), 10)
    assert layout.window_of_slot.tolist() == [0, 1, 1, 0, 2] and layout.num_windows == 3


def test_tightest_window_is_taken():
    # 6 and 6 open two windows, 3 leaves one of them a room of 1, and 1 must go there, not into the
    # room of 4.
    layout = lay_out(np.array([6, 6, 3, 1]), 10)
    rooms = [
        10 - sum(n for n, w in zip([6, 6, 3, 1], layout.window_of_slot, strict=True) if w == window)
        for window in range(2)
    ]
    assert sorted(rooms) == [0, 4]


def one_by_one(lengths, capacity):
    """Return the windows of best-fit decreasing, document by document.

    Of equally tight windows the newest is used.
    """
    rooms, windows, turn = [], [], []
    for step, length in enumerate(sorted(lengths, reverse=True)):
        fitting = [(room, -turn[w], w) for w, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            turn.append(step)
        window = min(fitting)[2] if fitting else len(rooms) - 1
        rooms[window] -= length
        turn[window] = step
        windows.append(window)
    return windows


DISTRIBUTIONS = {
    "uniform": lambda u, capacity: 1 + u * capacity,
    "short": lambda u, capacity: 1 + u * capacity / 8,
    "about a half": lambda u, capacity: capacity * (0.3 + 0.4 * u),
    "thirds": lambda u, capacity: capacity / 3 + np.where(u < 0.5, 1, -1) * (1 + 6 * u),
    "instructions": lambda u, capacity: (
        capacity / 16 * np.exp(1.2 * np.sqrt(-2 * np.log(1 - u)) * np.cos(40 * u))
    ),  # as log-normal
    "cut off at the window": lambda u, capacity: (
        capacity / 3 / (1 - u)
    ),  # many exactly as long as a window
}


def made_up_lengths(name, capacity, count, seed=0):
    uniform = packing.random_keys(count, seed, capacity, count) / 2.0**64
    return np.clip(DISTRIBUTIONS[name](uniform, capacity).astype(np.int64), 1, capacity)


@pytest.mark.parametrize("capacity", [16, 101, 2048])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_never_more_windows_than_first_fit_decreasing(name, capacity):
    for count, seed in ((800, 0), (25, 1), (26, 2), (27, 3)):
        lengths = made_up_lengths(name, capacity, count, seed)
        layout = lay_out(lengths, capacity)
        used = np.bincount(layout.window_of_slot, weights=np.sort(lengths)[::-1])
        assert len(used) == layout.num_windows and used.max() <= capacity and used.min() > 0
        plain = first_fit_decreasing(lengths.tolist(), capacity)
        assert lower_bound(lengths, capacity) <= layout.num_windows <= plain
        assert packing.first_fit_decreasing(lengths, capacity).num_windows == plain


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_best_fit_as_document_by_document(name):
    for capacity, count in ((12, 40), (50, 60), (300, 120)):
        lengths = made_up_lengths(name, capacity, count)
        assert best_fit_decreasing(lengths, capacity).window_of_slot.tolist() == one_by_one(
            lengths.tolist(), capacity
        )


def test_where_best_fit_needs_more_the_other_is_taken():
    lengths = np.array(
        [
            7,
            9,
            12,
            7,
            12,
            6,
            2,
            3,
            6,
            8,
            3,
            13,
            7,
            3,
            2,
            7,
            5,
            11,
            15,
            15,
            15,
            2,
            10,
            7,
            12,
            15,
            15,
            7,
            11,
            15,
            7,
            1,
            14,
            2,
            6,
            8,
        ]
    )
    assert (
        best_fit_decreasing(lengths, 50).num_windows == 7
        and first_fit_decreasing(lengths.tolist(), 50) == 6
    )
    layout = lay_out(lengths, 50)
    used = np.bincount(layout.window_of_slot, weights=np.sort(lengths)[::-1])
    assert layout.num_windows == 6 and used.max() <= 50 and used.sum() == lengths.sum()


def test_lower_bound_by_hand():
    assert (
        lower_bound(np.array([6, 6, 6]), 10) == 3
    )  # no two share a window, though 18 tokens fill two
    assert lower_bound(np.array([6, 6, 5, 5, 5]), 10) == 4  # a 5 has no room beside a 6
    assert lower_bound(np.array([6, 4, 4]), 10) == 2 and lower_bound(np.array([10] * 3), 10) == 3
    assert lower_bound(np.array([3, 3, 3]), 10) == 1 and lower_bound(np.zeros(0, int), 10) == 0
    assert lay_out(np.zeros(0, int), 10).num_windows == 0


def test_every_epoch_holds_every_document_once_and_fits():
    lengths = 1 + shuffled(500, 3) % 40
    layout = lay_out(lengths, 64)
    orders = []
    for epoch in range(3):
        documents, starts = assign_epoch(layout, lengths, 7, epoch)
        assert sorted(documents.tolist()) == list(range(500))
        assert len(starts) == layout.num_windows + 1 and starts[0] == 0 and starts[-1] == 500
        assert np.add.reduceat(lengths[documents], starts[:-1]).max() <= 64
        orders.append(documents.tolist())
    assert orders[0] != orders[1] != orders[2]
    assert assign_epoch(layout, lengths, 7, 0)[0].tolist() == orders[0]
    assert assign_epoch(layout, lengths, 8, 0)[0].tolist() != orders[0]


def test_neighbours_change_between_epochs():
    lengths = np.full(100, 8)
    layout = lay_out(lengths, 16)
    pairs = [
        {frozenset(documents[a : a + 2].tolist()) for a in starts[:-1]}
        for documents, starts in (assign_epoch(layout, lengths, 1, epoch) for epoch in range(2))
    ]
    assert len(pairs[0] & pairs[1]) < 10


def test_shuffle_never_changes():
    # Written down from the first version: another order would let a resumed run read some documents
    # twice and others never.
    assert shuffled(8, 1234, 0).tolist() == [5, 6, 3, 7, 4, 1, 2, 0]
    assert shuffled(0, 1).tolist() == []
