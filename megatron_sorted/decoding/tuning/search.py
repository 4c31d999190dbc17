"""Choosing a way's exits, thresholds and lengths for a model, texts and a machine."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sorted.decoding.sampling import SURENESS
from megatron_sorted.decoding.strategies import (
    EarlyExit,
    Full,
    SelfSpeculative,
    SortedSpeculative,
    Strategy,
    TreeSpeculative,
)
from megatron_sorted.decoding.tuning.costs import Costs
from megatron_sorted.decoding.tuning.forecast import Forecast, forecast
from megatron_sorted.decoding.tuning.traces import Trace

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.95)
"""Thresholds are tried where so many of an exit's confidences lie below them."""
MOST_EXITS = 3
"""Exits of an adaptive way; each more is another head to pay for every token."""


@dataclass(frozen=True)
class Choice:
    """A way with its options, and what is expected of it."""

    strategy: Strategy
    expected: Forecast


def thresholds_to_try(traces: Sequence[Trace], place: int, measure: str) -> list[float]:
    """Return thresholds at quantiles of an exit's confidences, rounded, increasing."""
    values = sorted(
        itertools.chain.from_iterable(trace.sure_dn[measure][place] for trace in traces)
    )
    return sorted({round(values[int(share * (len(values) - 1))], 3) for share in SHARES})


class Tuner:
    """Looks for the fastest options of each way by recorded texts and measured costs.

    Args:
        traces: Of texts like those that will be written.
        depths: Of the records: exits of what drafts.
        costs: Of the model on this machine.
        full: The full model's depth.
        drafting: Costs of another model that drafts; None where the model does itself.
    """

    def __init__(
        self,
        traces: list[Trace],
        depths: Sequence[int],
        costs: Costs,
        full: int,
        drafting: Costs | None = None,
    ):
        self.traces, self.depths, self.costs, self.full, self.drafting = (
            traces,
            list(depths),
            costs,
            full,
            drafting,
        )
        self.base = self._forecast(Full())

    def self_speculative(self) -> Choice:
        """Return the best depth and draft length."""
        return self._best(
            SelfSpeculative(depth, length) for depth in self.depths for length in LENGTHS
        )

    def sorted_speculative(self) -> Choice:
        """Return the best exits, thresholds and draft length: exit by exit, each tuned coordinate by coordinate."""
        start = self.self_speculative().strategy
        best = self._best([SortedSpeculative((start.depth,), (0.0,), start.num_draft_tokens)])

        def options(depths: tuple[int, ...]) -> list[Choice]:
            return [
                self._climb(depths, measure, best.strategy.num_draft_tokens) for measure in SURENESS
            ]

        return max([best, *self._exit_by_exit(options)], key=_speed)

    def early_exit(self, least_same: float) -> Choice | None:
        """Return the fastest exits and thresholds whose tokens are the full model's at least so often; None if there are none.

        Of the model's own exits only: where another model drafts, a token that leaves there is no token of this one.
        """

        def options(depths: tuple[int, ...]) -> list[Choice]:
            found = []
            for measure in SURENESS:
                tries = [
                    [*thresholds_to_try(self.traces, self.depths.index(depth), measure), 1.0]
                    for depth in depths
                ]
                for step in range(max(map(len, tries))):
                    strategy = EarlyExit(
                        depths, tuple(row[min(step, len(row) - 1)] for row in tries), measure
                    )
                    found.append(Choice(strategy, self._forecast(strategy)))
            return [choice for choice in found if choice.expected.share_same >= least_same]

        return max(self._exit_by_exit(options), key=_speed, default=None)

    def _exit_by_exit(self, options: Callable[[tuple[int, ...]], list[Choice]]) -> list[Choice]:
        """Return the best choices with one exit, with one more, and so on; of each number those that hold the exits of the one before."""
        found, chosen = [], ()
        for _ in range(min(MOST_EXITS, len(self.depths))):
            more = [
                option
                for depth in self.depths
                if depth not in chosen
                for option in options(tuple(sorted((*chosen, depth))))
            ]
            if not more:
                break
            found.append(max(more, key=_speed))
            chosen = found[-1].strategy.depths
        return found

    def trees(self, budget: int = 12) -> list[TreeSpeculative]:
        """Return trees worth running: their speed cannot be told from records of one path, so they are measured."""
        by_length = {
            strategy.depth: self._forecast(strategy)
            for strategy in (SelfSpeculative(depth, 6) for depth in self.depths)
        }
        likely = sorted(by_length, key=lambda depth: -by_length[depth].tokens_per_second)[:2]
        shapes = [
            (3, 1, 6, 2),
            (4, 1, 8, 2),
            (5, 1, 8, 2),
            (6, 1, 8, 2),
            (6, 1, 12, 3),
            (4, 2, 8, 2),
        ]
        return [TreeSpeculative((depth,), (), *shape) for depth in likely for shape in shapes][
            :budget
        ]

    def _climb(self, depths: tuple[int, ...], measure: str, length: int) -> Choice:
        tries = [
            [0.0, *thresholds_to_try(self.traces, self.depths.index(depth), measure)]
            for depth in depths
        ]
        thresholds = [row[len(row) // 2] for row in tries]
        best = None
        for _ in range(2):
            for index, row in enumerate(tries):
                options = [(*thresholds[:index], value, *thresholds[index + 1 :]) for value in row]
                best = self._best(
                    SortedSpeculative(depths, option, length, measure) for option in options
                )
                thresholds = list(best.strategy.thresholds)
            best = self._best(
                SortedSpeculative(depths, tuple(thresholds), value, measure) for value in LENGTHS
            )
            length = best.strategy.num_draft_tokens
        return best

    def _best(self, strategies) -> Choice:
        return max(
            (Choice(strategy, self._forecast(strategy)) for strategy in strategies), key=_speed
        )

    def _forecast(self, strategy: Strategy) -> Forecast:
        return forecast(strategy, self.traces, self.depths, self.costs, self.full, self.drafting)


def _speed(choice: Choice) -> float:
    return choice.expected.tokens_per_second


class Bandit:
    """Learns while serving which of some ways is fastest, for each task apart.

    Source: upper confidence bounds, UCB1 (Auer, Cesa-Bianchi and Fischer 2002, figure 1), rewards scaled by the best seen so far.

    Args:
        ways: What can be chosen.
        state: What `state_dict` gave, to go on from.
    """

    def __init__(self, strategies: Sequence[Strategy], state: dict | None = None):
        self.strategies = list(strategies)
        self.tasks: dict[str, list[list[float]]] = {}
        self.failures: dict[str, list[int]] = {}
        for task, rows in (state or {}).items():
            if len(rows) == len(self.strategies):
                self.begin(task)
                self.tasks[task] = [list(row) for row in rows]

    def begin(self, task: str) -> None:
        """Remember a task."""
        self.tasks.setdefault(task, [[0.0, 0.0, 0.0] for _ in self.strategies])
        self.failures.setdefault(task, [0] * len(self.strategies))

    def choose(self, task: str) -> int:
        """Return the place of the way to take next: each once at first, then the one with the highest bound.

        One that has always failed is tried again when the others have done ten times as much as before its last failure.
        """
        self.begin(task)
        rows, failures = self.tasks[task], self.failures[task]
        total = sum(row[0] for row in rows)
        due = [
            place
            for place, row in enumerate(rows)
            if not row[0] and (not failures[place] or total >= 10 ** failures[place])
        ]
        if due or not total:
            return due[0] if due else failures.index(min(failures))
        speeds = {place: row[1] / row[2] for place, row in enumerate(rows) if row[0]}
        best = max(speeds.values())
        return max(
            speeds,
            key=lambda place: (
                speeds[place] / best + (2 * math.log(total) / rows[place][0]) ** 0.5 / 4
            ),
        )

    def learn(self, task: str, place: int, num_tokens: int, seconds: float) -> None:
        """Note a text that a way wrote."""
        row = self.tasks[task][place]
        row[0] += 1
        row[1] += num_tokens
        row[2] += max(seconds, 1e-9)

    def fail(self, task: str, place: int) -> None:
        """Note a way that wrote nothing."""
        self.failures[task][place] += 1

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Return {task: [times, tokens, seconds] of each way}."""
        return {task: [list(row) for row in rows] for task, rows in self.tasks.items()}
