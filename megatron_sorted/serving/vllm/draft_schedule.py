"""How many tokens to draft at each batch size, from measured steps and an exit's agreement.

With n tokens drafted for each of B texts, each accepted with probability a, a step adds

    1 + a + ... + a^n = (1 - a^(n+1)) / (1 - a)

tokens to a text (Leviathan et al., arXiv 2211.17192, equation 1), in the seconds of n drafting
passes and of one pass that verifies n + 1 tokens of each text. Needs neither torch nor vLLM.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MARGIN = 1.03
"""How many times as fast as plain decoding a draft must be to be chosen: above measured noise."""


def batch_sizes(most: int) -> list[int]:
    """Return the batch sizes to measure: powers of two, and the largest.

    >>> batch_sizes(12)
    [1, 2, 4, 8, 12]
    """
    return sorted({*(1 << power for power in range(most.bit_length())), most})


def lower_quartile(values: Sequence[float]) -> float:
    """Return the value that a quarter of the values do not exceed.

    >>> lower_quartile([9.0, 1.0, 2.0, 3.0, 4.0])
    2.0
    """
    return sorted(values)[(len(values) - 1) // 4]


@dataclass(frozen=True)
class StepCosts:
    """Seconds of an engine's steps by batch size.

    Attributes:
        plain: Seconds of a step without drafts, by batch size.
        drafting: Seconds that one drafted token of each text adds to a step, by batch size.
        verifying: Seconds of a step that verifies drafts and drafts nothing, by batch size and
            number of drafted tokens.
    """

    plain: Mapping[int, float]
    drafting: Mapping[int, float]
    verifying: Mapping[int, Mapping[int, float]]

    @property
    def sizes(self) -> list[int]:
        """Return the batch sizes that were measured, increasing."""
        return sorted(self.plain)

    @property
    def lengths(self) -> list[int]:
        """Return the draft lengths that were measured, increasing."""
        return sorted(self.verifying[self.sizes[0]])

    def seconds(self, batch: int, length: int) -> float:
        """Return the seconds of a step that drafts and verifies ``length`` tokens of each text.

        Between measured batch sizes it is linear.
        """
        sizes = self.sizes
        place = bisect_left(sizes, batch)
        if place == len(sizes):
            return self._measured(sizes[-1], length) * batch / sizes[-1]
        high = sizes[place]
        if high == batch or place == 0:
            return self._measured(high, length)
        low = sizes[place - 1]
        share = (batch - low) / (high - low)
        return (1 - share) * self._measured(low, length) + share * self._measured(high, length)

    def _measured(self, batch: int, length: int) -> float:
        if not length:
            return self.plain[batch]
        return length * self.drafting[batch] + self.verifying[batch][length]

    def rows(self) -> list[dict[str, Any]]:
        """Return the costs as JSON values, one row for each batch size."""
        return [
            {
                "batch_size": size,
                "plain": self.plain[size],
                "drafting": self.drafting[size],
                "verifying": {str(n): value for n, value in self.verifying[size].items()},
            }
            for size in self.sizes
        ]


def expected_tokens(acceptance: float, length: int) -> float:
    """Return the expected number of tokens that a step adds to a text.

    >>> expected_tokens(0.5, 2), expected_tokens(1.0, 4), expected_tokens(0.0, 4)
    (1.75, 5.0, 1.0)
    """
    return float(sum(acceptance**place for place in range(length + 1)))


def speed_up(costs: StepCosts, acceptance: float, batch: int, length: int) -> float:
    """Return the tokens a second with drafts of ``length``, relative to those without."""
    plain, drafted = costs.seconds(batch, 0), costs.seconds(batch, length)
    return expected_tokens(acceptance, length) * plain / drafted


def best_length(costs: StepCosts, acceptance: float, batch: int) -> int:
    """Return the draft length with the most tokens a second; 0 where none gains ``MARGIN``."""
    best = max(costs.lengths, key=lambda length: speed_up(costs, acceptance, batch, length))
    return best if speed_up(costs, acceptance, batch, best) >= MARGIN else 0


def draft_schedule(costs: StepCosts, acceptance: float) -> tuple[tuple[int, int, int], ...]:
    """Return rows (first batch size, last batch size, number of draft tokens).

    They cover 1 to the largest batch size that was measured; vLLM continues the last row.
    """
    rows: list[tuple[int, int, int]] = []
    for batch in range(1, costs.sizes[-1] + 1):
        length = best_length(costs, acceptance, batch)
        if rows and rows[-1][2] == length:
            rows[-1] = (rows[-1][0], batch, length)
        else:
            rows.append((batch, batch, length))
    return tuple(rows)


def schedule_lines(
    costs: StepCosts, acceptance: float, schedule: Sequence[Sequence[int]]
) -> list[str]:
    """Return the measured steps as a table: milliseconds, and the forecast speed of each length.

    The speed is relative to plain decoding.
    """
    lengths = costs.lengths
    lines = [
        f"{'texts at once':>13} {'plain ms':>9} {'draft ms':>9}"
        + "".join(f" {f'verify {n}':>9} {'speed':>6}" for n in lengths)
        + "  drafted tokens"
    ]
    for size in costs.sizes:
        cells = "".join(
            f" {1000 * costs.verifying[size][n]:9.2f} {speed_up(costs, acceptance, size, n):5.2f}x"
            for n in lengths
        )
        chosen = next(n for first, last, n in schedule if first <= size <= last)
        lines.append(
            f"{size:13} {1000 * costs.plain[size]:9.2f} {1000 * costs.drafting[size]:9.2f}{cells}"
            f"  {chosen}"
        )
    return lines
