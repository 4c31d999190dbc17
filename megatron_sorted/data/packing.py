"""Which documents share a window of ``seq_length`` tokens, and in which order windows and documents come.

The windows are laid out once, from the lengths alone. An epoch only draws which document of a given length stands in which place of
that length, so every epoch has the same number of windows and reshuffling 200,000 documents takes a fraction of a second.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Places for documents, longest first.

    Shapes:
        document_of_place: (documents,), a document of the place's length (ties in document order).
        window_of_place: (documents,).
    """

    document_of_place: np.ndarray
    window_of_place: np.ndarray
    num_windows: int


def random_keys(count: int, *seeds: int) -> np.ndarray:
    """Returns ``count`` uint64 that depend on ``seeds`` only.

    Raw output of a bit generator: numpy promises that this stream never changes between versions, which it does not promise for
    ``Generator.permutation``; a resume after an upgrade would otherwise read other data.
    """
    return np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count)


def shuffled(count: int, *seeds: int) -> np.ndarray:
    """Returns a permutation of ``range(count)`` that depends on ``seeds`` only."""
    return np.argsort(random_keys(count, *seeds), kind="stable")


def lay_out(lengths: np.ndarray, capacity: int) -> Layout:
    """Returns windows of ``capacity`` filled best-fit decreasing: each document, longest first, goes where least room remains after it.

    Windows are kept in one stack per remaining room; the bits of one integer say which stacks are not empty, so finding the
    tightest room that fits is a shift and a lowest-bit, not a search.
    """
    assert lengths.size == 0 or (lengths.min() > 0 and lengths.max() <= capacity)
    document_of_place = np.argsort(-lengths, kind="stable")
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    num_windows = 0
    window_of_place = []
    for length in lengths[document_of_place].tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            window = stacks[room].pop()
            if not stacks[room]:
                rooms ^= 1 << room
        else:
            room, window = capacity, num_windows
            num_windows += 1
        window_of_place.append(window)
        left = room - length
        if left:
            stacks[left].append(window)
            rooms |= 1 << left
    return Layout(document_of_place, np.array(window_of_place, np.int64), num_windows)


def assign_epoch(layout: Layout, lengths: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the documents of one epoch in reading order and where each window starts among them.

    Shapes:
        documents: (documents,), each document once.
        starts: (windows + 1,); window w holds ``documents[starts[w]:starts[w + 1]]``.
    """
    count = len(lengths)
    keys = random_keys(count, seed, epoch, 0)
    documents = np.lexsort((keys, -lengths))
    windows = shuffled(layout.num_windows, seed, epoch, 1)[layout.window_of_place]
    order = np.lexsort((random_keys(count, seed, epoch, 2), windows))
    starts = np.concatenate([[0], np.cumsum(np.bincount(windows, minlength=layout.num_windows))])
    return documents[order], starts
