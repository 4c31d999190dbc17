"""A contiguous range of a tensor's elements as a few rectangles.

torch's checkpoints save and load rectangles of a tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of a tensor.

    Attributes:
        first: Number of its first element in row-major order of the whole tensor; the others follow
            without a gap.
        offset: Position of its first corner in each dimension.
        shape: Size of the rectangle in each dimension.
    """

    first: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def rectangles_of_range(shape: Sequence[int], start: int, end: int) -> list[Rectangle]:
    """Split elements ``start``..``end`` - 1 of a tensor, in row-major order, into rectangles.

    There are at most 2 x dimensions - 1: the rest of a row, whole rows, and the beginning of a row.

    >>> [(r.offset, r.shape) for r in rectangles_of_range((3, 4), 2, 9)]
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]

    Args:
        shape: Shape of the whole tensor, of at least one dimension.
        start: Number of the first element.
        end: Number of the element after the last.
    """
    if start >= end:
        return []
    if len(shape) == 1:
        return [Rectangle(start, (start,), (end - start,))]
    size = prod(shape[1:])  # elements of a row
    first_row, last_row = start // size, (end - 1) // size
    if first_row == last_row:  # inside one row
        inside = rectangles_of_range(shape[1:], start - first_row * size, end - first_row * size)
        return [
            Rectangle(first_row * size + one.first, (first_row, *one.offset), (1, *one.shape))
            for one in inside
        ]
    whole_from = first_row if start == first_row * size else first_row + 1
    whole_to = last_row + 1 if end == (last_row + 1) * size else last_row
    corner = (whole_from, *(0,) * (len(shape) - 1))
    rectangles = rectangles_of_range(shape, start, whole_from * size)
    if whole_from < whole_to:
        whole_rows = Rectangle(whole_from * size, corner, (whole_to - whole_from, *shape[1:]))
        rectangles.append(whole_rows)
    return rectangles + rectangles_of_range(shape, whole_to * size, end)
