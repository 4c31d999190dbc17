"""A contiguous range of a tensor's elements as few rectangles: the form in which torch saves and loads any part of a tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Rectangle:
    """One rectangle.

    Attributes:
        first: Its first element, counted row by row through the whole tensor; the others follow without gap.
        offset: Of its corner in each dimension.
        shape: Its size in each dimension.
    """

    first: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def rectangles_of_range(shape: Sequence[int], start: int, end: int) -> list[Rectangle]:
    """Return the rectangles whose elements, one after another, are elements ``start``..``end`` - 1 of a tensor in row-major order.

    At most 2 x dimensions - 1 of them: the rest of a row, whole rows, and the beginning of a row.

    Args:
        shape: Of the whole tensor, at least one dimension.
        start: First element.
        end: First element not taken.
    """
    if start >= end:
        return []
    if len(shape) == 1:
        return [Rectangle(start, (start,), (end - start,))]
    row = prod(shape[1:])
    first_row, last_row = start // row, (end - 1) // row
    if first_row == last_row:  # inside one row
        inside = rectangles_of_range(shape[1:], start - first_row * row, end - first_row * row)
        return [
            Rectangle(first_row * row + box.first, (first_row, *box.offset), (1, *box.shape))
            for box in inside
        ]
    whole_from = first_row if start == first_row * row else first_row + 1
    whole_to = last_row + 1 if end == (last_row + 1) * row else last_row
    rest = (0,) * (len(shape) - 1)
    rectangles = rectangles_of_range(shape, start, whole_from * row)
    if whole_from < whole_to:
        rectangles.append(
            Rectangle(whole_from * row, (whole_from, *rest), (whole_to - whole_from, *shape[1:]))
        )
    return rectangles + rectangles_of_range(shape, whole_to * row, end)
