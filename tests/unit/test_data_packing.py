"""Packing: hand-made layouts, a brute-force reference, and what an epoch promises."""

import numpy as np
import pytest

from megatron_sorted.data.packing import assign_epoch, lay_out, shuffled


def first_fit_decreasing(lengths, capacity):
    """Returns the number of windows of the textbook method, quadratic."""
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
    assert layout.document_of_place.tolist() == [4, 3, 2, 1, 0]
    assert layout.window_of_place.tolist() == [0, 1, 1, 0, 2] and layout.num_windows == 3


def test_tightest_window_is_taken():
    # 6 and 6 open two windows, 3 leaves one of them a room of 1, and 1 must go there, not into the room of 4.
    layout = lay_out(np.array([6, 6, 3, 1]), 10)
    rooms = [10 - sum(n for n, w in zip([6, 6, 3, 1], layout.window_of_place, strict=True) if w == window) for window in range(2)]
    assert sorted(rooms) == [0, 4]


@pytest.mark.parametrize("capacity", [16, 100, 2048])
def test_as_full_as_first_fit_decreasing(capacity):
    lengths = 1 + shuffled(3000, capacity) % capacity
    layout = lay_out(lengths, capacity)
    used = np.bincount(layout.window_of_place, weights=lengths[layout.document_of_place])
    assert len(used) == layout.num_windows and used.max() <= capacity and used.min() > 0
    assert layout.num_windows <= 1.01 * first_fit_decreasing(lengths.tolist(), capacity)


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
    pairs = [{frozenset(documents[a : a + 2].tolist()) for a in starts[:-1]}
             for documents, starts in (assign_epoch(layout, lengths, 1, epoch) for epoch in range(2))]
    assert len(pairs[0] & pairs[1]) < 10


def test_shuffle_never_changes():
    # Written down from the first version: another order would let a resumed run read some documents twice and others never.
    assert shuffled(8, 1234, 0).tolist() == [5, 6, 3, 7, 4, 1, 2, 0]
    assert shuffled(0, 1).tolist() == []
