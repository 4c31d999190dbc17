"""Which source gives which sample of a blend.

The order is arithmetic on whole numbers, with random access and no table of all samples. Source i
has the share ``parts[i] / total``. Its j-th sample (from 1) may be given at slot ``floor((j - 1) /
share)`` at the earliest and must be given before slot ``ceil(j / share)``: then after any n samples
it has given ``floor(n * share)`` or ``ceil(n * share)``. Each slot goes to the sample with the
earliest deadline among those that may be given, which keeps every deadline, since dividing each
slot among the sources by their shares would (C. L. Liu and J. Layland, 1973; for whole slots R.
Tijdeman, "The chairman assignment problem", 1980). Giving each slot to the source that is furthest
behind, as is often done, does not keep within one sample: two sources of weight 20 beside six of
weight 1 come to be 1.48 samples off.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush
from math import gcd, lcm

import numpy as np

GRID = 10**9
"""Resolution of weights: those of up to nine digits are exact, others are rounded to this part.

Products stay within 64 bits.
"""
LONGEST_PERIOD = 1 << 16
BLOCK = 4096


def whole_parts(weights: Sequence[float]) -> list[int]:
    """Return whole numbers in the proportion of ``weights``, read as decimals (0.1 is a tenth).

    >>> whole_parts([0.3, 0.7])
    [3, 7]
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    divisor = gcd(*parts)
    parts = [part // divisor for part in parts]
    total = sum(parts)
    if total <= GRID:
        return parts
    floors = [part * GRID // total for part in parts]
    largest_rest_first = sorted(range(len(parts)), key=lambda i: -(parts[i] * GRID % total))
    for i in largest_rest_first[: GRID - sum(floors)]:
        floors[i] += 1
    return floors


class BlendOrder:
    """The order of a blend: sample number -> (source, number within the source)."""

    def __init__(self, weights: Sequence[float]):
        self.parts = whole_parts(weights)
        self.total = sum(self.parts)
        # the order repeats after ``total`` samples: a short period is computed once
        self._is_periodic = self.total <= LONGEST_PERIOD
        self._block_size = self.total if self._is_periodic else BLOCK
        self._block = lru_cache(maxsize=1)(self._compute_block)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the source of a sample and its number within that source."""
        block, inside = divmod(index, self._block_size)
        sources, numbers = self._block(0 if self._is_periodic else block)
        source = int(sources[inside])
        before = block * self.parts[source] if self._is_periodic else 0
        return source, before + int(numbers[inside])

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return source and number within it of every sample of one block, shapes (block,)."""
        first, parts, total = block * self._block_size, self.parts, self.total
        counts = self.counts(first)
        waiting = [(counts[i] * total // part, i) for i, part in enumerate(parts)]
        waiting.sort()
        ready: list[tuple[int, int]] = []
        sources, numbers = (
            np.empty(self._block_size, np.int32),
            np.empty(self._block_size, np.int64),
        )
        for inside in range(self._block_size):
            while waiting and waiting[0][0] <= first + inside:
                i = heappop(waiting)[1]
                heappush(ready, (self._deadline(i, counts[i] + 1), i))
            i = heappop(ready)[1]
            sources[inside], numbers[inside] = i, counts[i]
            counts[i] += 1
            heappush(waiting, (counts[i] * total // parts[i], i))
        return sources, numbers

    def _deadline(self, source: int, number: int) -> int:
        return -(-number * self.total // self.parts[source])

    def counts(self, num_samples: int) -> list[int]:
        """Return how many of the first ``num_samples`` samples each source gives, in closed form.

        Past deadlines are kept, so each source has given ``floor(n * share)``; some have given the
        one after as well, whose deadline is later (an unfinished sample). Take only the samples
        whose deadline is not after
        that of one unfinished sample: they are served as if there were no others, one per slot as
            long as any
        waits. So by slot n exactly ``min over s <= n of (released before s) + n - s`` of them are
        given (D. V. Lindley, 1952). Doing this for one deadline after another shows which are
        given. Only slots s since the
        earliest release of an unfinished sample matter: before that nothing is left out, and at
            least s samples
        are released before slot s.
        """
        n, total = num_samples, self.total
        counts = [n * part // total for part in self.parts]
        unfinished = [i for i, part in enumerate(self.parts) if n * part % total]
        if not unfinished:
            return counts
        unfinished.sort(key=lambda i: (self._deadline(i, counts[i] + 1), i))
        released = {i: counts[i] * total // self.parts[i] for i in unfinished}
        starts = sorted(set(released.values()))
        minima = np.minimum.reduceat(
            self._surplus(starts[0], n), [start - starts[0] for start in starts]
        ).tolist()
        given_before = None
        for taken in range(len(unfinished) + 1):
            late = [sum(released[i] <= start for i in unfinished[taken:]) for start in starts]
            given = min(
                0, *(least - left_out for least, left_out in zip(minima, late, strict=True))
            )
            if given_before is not None:
                counts[unfinished[taken - 1]] += given - given_before
            given_before = given
        return counts

    def _surplus(self, after: int, last: int) -> np.ndarray:
        """Return for each s in after + 1 .. last: the samples released before slot s, minus s."""
        steps = np.arange(1, last - after + 1)
        surplus = -after - steps
        for part in self.parts:
            whole, rest = divmod(after * part, self.total)
            surplus += whole - (-(rest + steps * part) // self.total)
        return surplus
