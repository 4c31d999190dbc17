"""Which documents share a window of ``seq_length`` tokens, and their order.

The windows are laid out once, from the lengths alone. An epoch only draws which document of a given
length takes which slot of that length, so every epoch has the same number of windows and
reshuffling 200,000 documents takes a fraction of a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedWindows:
    """Slots for documents, longest first.

    Shapes:
        window_of_slot: (documents,).
    """

    window_of_slot: np.ndarray
    num_windows: int


def random_keys(count: int, *seeds: int) -> np.ndarray:
    """Return ``count`` uint64 that depend on ``seeds`` only.

    They are the raw output of a bit generator. Numpy promises that this stream never changes
    between versions, unlike that of ``Generator.permutation``; otherwise a run that resumes after
    an upgrade would read other data.
    """
    return np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count)


def shuffled(count: int, *seeds: int) -> np.ndarray:
    """Return a permutation of ``range(count)`` that depends on ``seeds`` only."""
    return np.argsort(random_keys(count, *seeds), kind="stable")


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> PackedWindows:
    """Return windows of ``capacity`` filled best-fit decreasing.

    Each document, longest first, goes where the least room remains after it. Windows are kept in
    one stack per remaining room; the bits of one integer mark the stacks that are not empty, so the
    tightest room that fits is a shift and a lowest bit, not a search. Documents of one length are
    placed together: a window that takes one and has room for another is then the tightest, so it
    takes as many as it holds.
    """
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    num_windows = 0
    window_of_slot = []

    def push(left: int, windows: list[int]) -> None:
        nonlocal rooms
        if left and windows:
            stacks[left] += windows
            rooms |= 1 << left

    for length, count in _by_length(lengths):
        while count:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // length
            needed = -(-count // each)
            if fitting:
                windows = stacks[room][: -needed - 1 : -1]
                del stacks[room][-needed:]
                if not stacks[room]:
                    rooms ^= 1 << room
            else:
                windows = list(range(num_windows, num_windows + needed))
                num_windows += needed
            placed = min(count, each * len(windows))
            window_of_slot.append(np.repeat(windows, each)[:placed])
            whole, rest = divmod(placed, each)
            push(room - each * length, windows[:whole])
            push(room - rest * length, windows[whole:])
            count -= placed
    return PackedWindows(np.concatenate([np.zeros(0, np.int64), *window_of_slot]), num_windows)


def _by_length(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Return (length, number of documents), longest first."""
    return zip(
        *(part[::-1].tolist() for part in np.unique(lengths, return_counts=True)), strict=True
    )


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> PackedWindows:
    """Return windows of ``capacity`` filled first-fit decreasing.

    Each document, longest first, goes into the first window with room. Documents of one length are
    placed
    together: the first window takes as many as it has room for, then the next one.
    """
    rooms, window_of_slot = np.zeros(0, np.int64), []
    for length, count in _by_length(lengths):
        windows = np.flatnonzero(rooms >= length)
        fits = rooms[windows] // length
        taken = np.clip(count - (fits.cumsum() - fits), 0, fits)
        rooms[windows] -= taken * length
        window_of_slot.append(np.repeat(windows, taken))
        left = np.arange(count - int(taken.sum()))
        in_new = left // (capacity // length)
        window_of_slot.append(len(rooms) + in_new)
        rooms = np.concatenate([rooms, capacity - np.bincount(in_new) * length])
    return PackedWindows(np.concatenate([np.zeros(0, np.int64), *window_of_slot]), len(rooms))


def lower_bound(lengths: np.ndarray, capacity: int) -> int:
    """Return a lower bound of the number of windows of any packing.

    Source: bound L2 of S. Martello and P. Toth, "Lower bounds and reduction procedures for the bin
        packing
    problem" (1990). For a k up to half the capacity, documents longer than capacity - k share a
    window with none of at least k, those longer than half not with one another, and those of k to
    half that find no room beside the latter need windows of their own.
    """
    count = np.bincount(lengths, minlength=capacity + 1)
    tokens = count * np.arange(capacity + 1)
    # number and tokens of the documents of at least this length
    longer, tokens_from = count[::-1].cumsum()[::-1], tokens[::-1].cumsum()[::-1]
    half = capacity // 2 + 1
    k = np.arange(half)
    alone_or_first = longer[half]
    beside = alone_or_first - np.append(longer, 0)[capacity - k + 1]
    room = beside * capacity - (tokens_from[half] - np.append(tokens_from, 0)[capacity - k + 1])
    over = tokens_from[k] - tokens_from[half] - room
    return int(alone_or_first + np.maximum(0, -(-over // capacity)).max()) if len(lengths) else 0


def lay_out(lengths: np.ndarray, capacity: int) -> PackedWindows:
    """Return windows of ``capacity``: best-fit decreasing, or first-fit if that needs fewer.

    Neither is always the better one. Where the first reaches :func:`lower_bound`, as it nearly
    always does, the second is not tried.
    """
    assert lengths.size == 0 or (lengths.min() > 0 and lengths.max() <= capacity)
    best = best_fit_decreasing(lengths, capacity)
    if best.num_windows == lower_bound(lengths, capacity):
        return best
    first = first_fit_decreasing(lengths, capacity)
    return first if first.num_windows < best.num_windows else best


def assign_epoch(
    layout: PackedWindows, lengths: np.ndarray, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents of one epoch in reading order, and where each window begins among them.

    Shapes:
        documents: (documents,), each document once.
        starts: (windows + 1,); window w holds ``documents[starts[w]:starts[w + 1]]``.
    """
    count = len(lengths)
    keys = random_keys(count, seed, epoch, 0)
    documents = np.lexsort((keys, -lengths))
    windows = shuffled(layout.num_windows, seed, epoch, 1)[layout.window_of_slot]
    order = np.lexsort((random_keys(count, seed, epoch, 2), windows))
    starts = np.concatenate([[0], np.cumsum(np.bincount(windows, minlength=layout.num_windows))])
    return documents[order], starts
