"""Ranges as rectangles: every range of small tensors, element by element."""

import itertools

import numpy as np
import pytest

from megatron_sorted.checkpoint.sharding.rectangles import Rectangle, rectangles_of_range


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (6, 1), (3, 2, 4), (2, 3, 1, 3)])
def test_every_range_of_small_tensors(shape):
    numbers = np.arange(np.prod(shape)).reshape(shape)
    for start, end in itertools.combinations_with_replacement(range(numbers.size + 1), 2):
        rectangles = rectangles_of_range(shape, start, end)
        assert len(rectangles) <= 2 * len(shape) - 1
        seen = []
        for rectangle in rectangles:
            part = numbers[
                tuple(
                    slice(a, a + n) for a, n in zip(rectangle.offset, rectangle.shape, strict=True)
                )
            ]
            assert part.size > 0 and part.reshape(-1)[0] == rectangle.first
            seen += part.reshape(-1).tolist()
        assert seen == list(range(start, end))


def test_by_hand():
    assert rectangles_of_range((4, 5), 3, 17) == [
        Rectangle(3, (0, 3), (1, 2)),
        Rectangle(5, (1, 0), (2, 5)),
        Rectangle(15, (3, 0), (1, 2)),
    ]
    assert rectangles_of_range((4, 5), 5, 15) == [Rectangle(5, (1, 0), (2, 5))]
    assert rectangles_of_range((4, 5), 6, 8) == [Rectangle(6, (1, 1), (1, 2))]
