"""A search for a strategy's fastest options, and a bandit that learns the fastest strategy."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sorted.confidence import CONFIDENCE
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
"""Quantiles of an exit's confidence at which thresholds are tried."""
MAX_EXITS = 3
"""Maximum number of exits of a strategy; each more costs another head for every token."""


TREES = ((3, 1, 6, 2), (4, 1, 8, 2), (5, 1, 8, 2), (6, 1, 8, 2), (6, 1, 12, 3), (4, 2, 8, 2))
"""Trees that are tried: numbers of levels, branches, nodes and candidates."""


@dataclass(frozen=True)
class Choice:
    """A strategy with its options and its forecast."""

    strategy: Strategy
    expected: Forecast


def thresholds_to_try(traces: Sequence[Trace], index: int, measure: str) -> list[float]:
    """Return thresholds at quantiles of the confidence of an exit, rounded, increasing."""
    values = sorted(
        itertools.chain.from_iterable(trace.confidence_dn[measure][index] for trace in traces)
    )
    return sorted({round(values[int(share * (len(values) - 1))], 3) for share in SHARES})


class Tuner:
    """A search for the fastest options of each strategy, by forecasts.

    Args:
        traces: Traces of texts like those that will be generated.
        depths: Depths of the traces: exits of the model that drafts.
        costs: Costs of the model on this machine.
        full: Depth of the full model.
        drafting: Costs of another model that drafts; None if the model drafts itself.
    """

    def __init__(
        self,
        traces: list[Trace],
        depths: Sequence[int],
        costs: Costs,
        full: int,
        drafting: Costs | None = None,
    ):
        self.traces, self.depths, self.full = traces, list(depths), full
        self.costs, self.drafting = costs, drafting
        self.base = self._forecast(Full())

    def speed_up(self, strategy: Strategy) -> float:
        """Return the forecast speed of a strategy, relative to the full model's."""
        return self._forecast(strategy).tokens_per_second / self.base.tokens_per_second

    def self_speculative(self) -> Choice:
        """Return the best depth and draft length."""
        return self._best(
            SelfSpeculative(depth, length) for depth in self.depths for length in LENGTHS
        )

    def sorted_speculative(self) -> Choice:
        """Return the best exits, thresholds and draft length.

        Exits are added one by one; the options of each set are tuned one coordinate at a time.
        """
        start = self.self_speculative().strategy
        best = self._best([SortedSpeculative((start.depth,), (0.0,), start.num_draft_tokens)])

        def options(depths: tuple[int, ...]) -> list[Choice]:
            return [
                self._climb(depths, measure, best.strategy.num_draft_tokens)
                for measure in CONFIDENCE
            ]

        return max([best, *self._exit_by_exit(options)], key=_speed)

    def early_exit(self, least_same: float) -> Choice | None:
        """Return the fastest exits and thresholds that keep most of the full model's tokens.

        Only for the model's own exits: another model's early token is no token of this model.

        Args:
            least_same: Share of tokens that must be the full model's.

        Returns:
            The best options; None if none keeps that share.
        """

        def options(depths: tuple[int, ...]) -> list[Choice]:
            choices = []
            for measure in CONFIDENCE:
                tries = [
                    [*thresholds_to_try(self.traces, self.depths.index(depth), measure), 1.0]
                    for depth in depths
                ]
                for step in range(max(map(len, tries))):
                    strategy = EarlyExit(
                        depths, tuple(row[min(step, len(row) - 1)] for row in tries), measure
                    )
                    choices.append(Choice(strategy, self._forecast(strategy)))
            return [choice for choice in choices if choice.expected.share_same >= least_same]

        return max(self._exit_by_exit(options), key=_speed, default=None)

    def _exit_by_exit(self, options: Callable[[tuple[int, ...]], list[Choice]]) -> list[Choice]:
        """Return the best choice for one exit, for these and one more, and so on."""
        best, depths = [], ()
        for _ in range(min(MAX_EXITS, len(self.depths))):
            choices = [
                choice
                for depth in self.depths
                if depth not in depths
                for choice in options(tuple(sorted((*depths, depth))))
            ]
            if not choices:
                break
            best.append(max(choices, key=_speed))
            depths = best[-1].strategy.depths
        return best

    def trees(self, budget: int = 12) -> list[TreeSpeculative]:
        """Return trees worth running: traces of one path cannot forecast the speed of a tree."""
        speeds = {
            depth: self._forecast(SelfSpeculative(depth, 6)).tokens_per_second
            for depth in self.depths
        }
        fastest = sorted(speeds, key=lambda depth: -speeds[depth])[:2]
        trees = [TreeSpeculative((depth,), (), *shape) for depth in fastest for shape in TREES]
        return trees[:budget]

    def _climb(self, depths: tuple[int, ...], measure: str, length: int) -> Choice:
        """Return the best thresholds and draft length, tuned one after another, two times."""
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
    """A bandit that learns while serving which strategy is fastest, separately for each task.

    Source: upper confidence bounds, UCB1 (Auer, Cesa-Bianchi and Fischer 2002, figure 1), with
    rewards scaled by the best speed so far.

    Args:
        strategies: The strategies to choose from.
        state: An earlier `state_dict` to continue from.
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
        """Add a task if it is new."""
        self.tasks.setdefault(task, [[0.0, 0.0, 0.0] for _ in self.strategies])
        self.failures.setdefault(task, [0] * len(self.strategies))

    def choose(self, task: str) -> int:
        """Return the index of the strategy to use next.

        Each is used once at first, then the one with the highest bound. One that has always failed
        is tried again when the others have run ten times as often as before its last failure.
        """
        self.begin(task)
        rows, failures = self.tasks[task], self.failures[task]
        total = sum(row[0] for row in rows)
        due = [
            index
            for index, row in enumerate(rows)
            if not row[0] and (not failures[index] or total >= 10 ** failures[index])
        ]
        if due or not total:
            return due[0] if due else failures.index(min(failures))
        speeds = {index: row[1] / row[2] for index, row in enumerate(rows) if row[0]}
        best = max(speeds.values())

        def bound(index: int) -> float:
            return speeds[index] / best + (2 * math.log(total) / rows[index][0]) ** 0.5 / 4

        return max(speeds, key=bound)

    def learn(self, task: str, index: int, num_tokens: int, seconds: float) -> None:
        """Record a text that a strategy generated."""
        row = self.tasks[task][index]
        row[0] += 1
        row[1] += num_tokens
        row[2] += max(seconds, 1e-9)

    def fail(self, task: str, index: int) -> None:
        """Record a failure of a strategy."""
        self.failures[task][index] += 1

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Return {task: [number of texts, tokens, seconds] of each strategy}."""
        return {task: [list(row) for row in rows] for task, rows in self.tasks.items()}
