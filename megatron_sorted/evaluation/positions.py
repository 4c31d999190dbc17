"""Windows of one length and the buckets of positions in them, by which losses are measured."""

from dataclasses import dataclass

from megatron_sorted.errors import SettingsError

MAX_BUCKETS = 256
"""Largest number of buckets, each of which is a row of a table."""


@dataclass(frozen=True)
class Positions:
    """Windows that are read, and the buckets of positions in them.

    The position of a prediction is the number of tokens that are read before it, from 1 to the
    length of a window.

    Attributes:
        length: Length of every window in tokens.
        lasts: Last position of each bucket, increasing; the first bucket begins at 1.
        joined: Whether windows are cut from all documents, one after another, instead of from each.
    """

    length: int
    lasts: tuple[int, ...]
    joined: bool = False

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Return first and last position of each bucket."""
        return list(zip((1, *(last + 1 for last in self.lasts)), self.lasts, strict=False))


def cut_positions(length: int, size: int | None) -> tuple[int, ...]:
    """Return the last position of each bucket.

    Args:
        length: Length of a window in tokens.
        size: Number of positions of each bucket; None for buckets that end at powers of two. The
            last one may be shorter.

    Raises:
        SettingsError: A bucket would be longer than a window, or there are too many.

    >>> cut_positions(20, None), cut_positions(20, 8)
    ((1, 2, 4, 8, 16, 20), (8, 16, 20))
    """
    if size is None:
        powers = [1 << power for power in range(length.bit_length())]
        return tuple(powers) if powers[-1] == length else (*powers, length)
    if size > length:
        raise SettingsError(
            f"--position-buckets: {size} positions are more than the {length} of a window. "
            "Use fewer, or a greater --length."
        )
    if length > size * MAX_BUCKETS:
        raise SettingsError(
            f"--position-buckets: {length} positions in buckets of {size} are "
            f"{-(-length // size):,} rows, more than {MAX_BUCKETS}. "
            f"Use at least {-(-length // MAX_BUCKETS)}."
        )
    return (*range(size, length, size), length)
