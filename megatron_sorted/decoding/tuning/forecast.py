"""How fast a way would be: recorded texts walked through with measured costs, without running the model."""

from dataclasses import dataclass

from megatron_sorted.decoding.strategies import (
    EarlyExit,
    Fixed,
    Full,
    SelfSpeculative,
    SortedSpeculative,
    Strategy,
)
from megatron_sorted.decoding.tuning.costs import Costs
from megatron_sorted.decoding.tuning.traces import Trace


@dataclass
class Forecast:
    """What walking through texts gave.

    Attributes:
        num_tokens: Of the texts.
        num_steps: Times that the full model was asked, or tokens where it is not.
        seconds: By the measured costs.
        num_same: Tokens that are the full model's.
        num_drafted, num_accepted: Drafts.
    """

    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    num_same: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Return the speed."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def share_same(self) -> float:
        """Return the share of tokens that are the full model's."""
        return self.num_same / self.num_tokens if self.num_tokens else 1.0


class _Reader:
    """What one model has not read of a text yet, group of layers by group, and the seconds it took to read the rest."""

    def __init__(self, costs: Costs):
        self.costs, self.pending, self.seconds = costs, dict.fromkeys(costs.layers, 0), 0.0

    def add(self, count: int) -> None:
        """Tokens come that nothing has read."""
        for depth in self.pending:
            self.pending[depth] += count

    def drop(self, count: int) -> None:
        """The newest tokens go; those that had read them have read less."""
        for depth, pending in self.pending.items():
            self.pending[depth] = max(0, pending - count)

    def read(self, depth: int, width: int) -> None:
        """An exit reads what it has not, and says something of ``width`` tokens."""
        for stop, pending in self.pending.items():
            if stop <= depth:
                self.seconds += self.costs.of_layers(stop, pending)
                self.pending[stop] = 0
        self.seconds += self.costs.of_head(depth, width)


class _Clock:
    """Seconds of a text: of the model and of what drafts for it, which may be the model itself."""

    def __init__(self, costs: Costs, drafting: Costs | None):
        self.model = _Reader(costs)
        self.drafter = self.model if drafting is None else _Reader(drafting)
        self.readers = [self.model] if drafting is None else [self.model, self.drafter]

    @property
    def seconds(self) -> float:
        """Return the seconds so far."""
        return sum(reader.seconds for reader in self.readers)

    def add(self, count: int) -> None:
        """Tokens come that nothing has read."""
        for reader in self.readers:
            reader.add(count)

    def drop(self, count: int) -> None:
        """The newest tokens go."""
        for reader in self.readers:
            reader.drop(count)


def forecast(
    strategy: Strategy,
    traces: list[Trace],
    depths: list[int],
    costs: Costs,
    full: int,
    drafting: Costs | None = None,
) -> Forecast:
    """Return what a way would take for the recorded texts, their prompts left out.

    After a drafted token that is wrong, the exits are taken to be as sure as they were on the right text.

    Args:
        way: Any but a tree, whose other branches no record holds; if another model drafts, one that drafts, or ``Full``.
        traces: Recorded with ``depths``.
        depths: Of the records: the model's own exits without the full model, or all exits of another model that drafts.
        costs: Of the model: with the full model's depth, and ``depths`` where they are its own.
        full: The full model's depth.
        drafting: Costs of another model that drafts, with ``depths``.
    """
    found = Forecast()
    place = {depth: index for index, depth in enumerate(depths)}
    for trace in traces:
        clock = _Clock(costs, drafting)
        clock.add(1)
        at, n = 0, len(trace.tokens)
        while at < n:
            if isinstance(strategy, Full | Fixed | EarlyExit):
                at += _one_token(strategy, trace, at, place, clock, full, found)
            else:
                at += _chain(strategy, trace, at, place, clock, full, found)
        found.num_tokens += n
        found.seconds += clock.seconds
    return found


def _one_token(
    strategy: Full | Fixed | EarlyExit,
    trace: Trace,
    at: int,
    place: dict[int, int],
    clock: _Clock,
    full: int,
    found: Forecast,
) -> int:
    asked = {Full: ((), ())}.get(type(strategy)) or (
        ((strategy.depth,), (-1.0,))
        if isinstance(strategy, Fixed)
        else (strategy.depths, strategy.thresholds)
    )
    by = full
    for depth, threshold in zip(*asked, strict=True):
        clock.model.read(depth, 1)
        sure = (
            1.0
            if isinstance(strategy, Fixed)
            else trace.sure_dn[strategy.measure][place[depth]][at]
        )
        if sure > threshold:
            by = depth
            break
    if by == full:
        clock.model.read(full, 1)
    found.num_same += by == full or trace.same_dn[place[by]][at]
    found.num_steps += 1
    clock.add(1)
    return 1


def _chain(
    strategy: SelfSpeculative | SortedSpeculative,
    trace: Trace,
    at: int,
    place: dict[int, int],
    clock: _Clock,
    full: int,
    found: Forecast,
) -> int:
    is_sorted, n = isinstance(strategy, SortedSpeculative), len(trace.tokens)
    depths = strategy.depths if is_sorted else (strategy.depth,)
    drafted = right = 0
    is_right = True
    for step in range(strategy.num_draft_tokens):
        where, by, is_sure = min(at + step, n - 1), depths[-1], not is_sorted
        for depth in depths:
            clock.drafter.read(depth, 1)
            if (
                is_sorted
                and trace.sure_dn[strategy.measure][place[depth]][where]
                > strategy.thresholds[depths.index(depth)]
            ):
                by, is_sure = depth, True
                break
        drafted += 1
        clock.add(1)
        is_right = is_right and trace.same_dn[place[by]][where]
        right += is_right
        if not is_sure:
            break
    clock.model.read(full, drafted + 1)
    clock.drop(drafted - right)
    clock.add(1)
    found.num_steps += 1
    found.num_drafted += drafted
    added = min(right + 1, n - at)
    found.num_accepted += min(right, added)
    found.num_same += added
    return added
