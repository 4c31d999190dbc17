"""The forecast speed of a strategy, from recorded texts and measured costs, without the model."""

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
    """The counts and the time that a strategy would need for some texts.

    Attributes:
        num_tokens: Number of tokens of the texts.
        num_steps: Number of steps: verifications, or tokens for a strategy without drafts.
        seconds: Time by the measured costs.
        num_same: Number of tokens that are the full model's.
        num_drafted, num_accepted: Numbers of drafted tokens and of those in the texts.
    """

    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    num_same: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens per second."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def share_same(self) -> float:
        """Return the share of tokens that are the full model's."""
        return self.num_same / self.num_tokens if self.num_tokens else 1.0


class _ModelClock:
    """The time of one model, and the number of tokens that each segment has not processed yet."""

    def __init__(self, costs: Costs):
        self.costs, self.pending, self.seconds = costs, dict.fromkeys(costs.layers, 0), 0.0
        self.blocks = dict.fromkeys(costs.blocks, 0)  # the same of the exits' own blocks
        self.newest = 0  # exit of the newest pass

    def add(self, count: int) -> None:
        """Append tokens that no segment has processed."""
        for waiting in (self.pending, self.blocks):
            for depth in waiting:
                waiting[depth] += count

    def drop(self, count: int) -> None:
        """Drop the newest tokens, processed or not."""
        for waiting in (self.pending, self.blocks):
            for depth, pending in waiting.items():
                waiting[depth] = max(0, pending - count)

    def read(self, depth: int, width: int) -> None:
        """Process all tokens up to an exit and evaluate its head for ``width`` of them."""
        stops = [stop for stop in self.pending if stop <= depth]
        counts = [self.pending[stop] for stop in stops] + [self.blocks.get(depth, width)]
        is_next = self.newest == depth and width == 1 and set(counts) == {1}
        if is_next and depth in self.costs.drafts:
            self.seconds += self.costs.drafts[depth]
        else:
            for stop in stops:
                self.seconds += self.costs.of_layers(stop, self.pending[stop])
            self.seconds += self.costs.of_block(depth, self.blocks.get(depth, 0))
            self.seconds += self.costs.of_head(depth, width)
        self.pending.update(dict.fromkeys(stops, 0))
        if depth in self.blocks:
            self.blocks[depth] = 0
        self.newest = depth


class _Clock:
    """The time of a text: of the model, and of the other model that drafts if there is one."""

    def __init__(self, costs: Costs, drafting: Costs | None):
        self.model = self.drafter = _ModelClock(costs)
        self.clocks = [self.model]
        if drafting is not None:
            self.drafter = _ModelClock(drafting)
            self.clocks.append(self.drafter)
        self.host, self.host_seconds = (drafting or costs).host, 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds so far."""
        return sum(clock.seconds for clock in self.clocks) + self.host_seconds

    def add(self, count: int) -> None:
        """Append tokens that no model has processed."""
        for clock in self.clocks:
            clock.add(count)

    def drop(self, count: int) -> None:
        """Drop the newest tokens."""
        for clock in self.clocks:
            clock.drop(count)


def forecast(
    strategy: Strategy,
    traces: list[Trace],
    depths: list[int],
    costs: Costs,
    full: int,
    drafting: Costs | None = None,
) -> Forecast:
    """Return the forecast of a strategy for the recorded texts, without their prompts.

    After a wrong drafted token, the exits' confidence is taken from the right text.

    Args:
        strategy: Any strategy but a tree, since traces hold no other branches. If another model
            drafts, a speculative one or ``Full``.
        traces: Traces recorded with ``depths``.
        depths: Depths of the traces: the model's own exits without the full model, or all exits of
            another model that drafts.
        costs: Costs of the model: the full model's depth, and ``depths`` if they are its own.
        full: Depth of the full model.
        drafting: Costs of another model that drafts, with ``depths``.
    """
    total = Forecast()
    index_of = {depth: index for index, depth in enumerate(depths)}
    for trace in traces:
        clock = _Clock(costs, drafting)
        clock.add(1)
        at, n = 0, len(trace.tokens)
        step = _one_token if isinstance(strategy, Full | Fixed | EarlyExit) else _chain
        while at < n:
            at += step(strategy, trace, at, index_of, clock, full, total)
        total.num_tokens += n
        total.seconds += clock.seconds
    return total


def _one_token(
    strategy: Full | Fixed | EarlyExit,
    trace: Trace,
    at: int,
    index_of: dict[int, int],
    clock: _Clock,
    full: int,
    total: Forecast,
) -> int:
    """Add a step without drafts to the forecast; return its number of tokens."""
    by = full
    if isinstance(strategy, Fixed):
        by = strategy.depth
        clock.model.read(by, 1)
    elif isinstance(strategy, EarlyExit):
        for depth, threshold in zip(strategy.depths, strategy.thresholds, strict=True):
            clock.model.read(depth, 1)
            clock.host_seconds += clock.host.confidence[strategy.measure]
            if trace.confidence_dn[strategy.measure][index_of[depth]][at] > threshold:
                by = depth
                break
    if by == full:
        clock.model.read(full, 1)
    total.num_same += by == full or trace.same_dn[index_of[by]][at]
    total.num_steps += 1
    clock.host_seconds += clock.model.costs.host.token
    clock.add(1)
    return 1


def _chain(
    strategy: SelfSpeculative | SortedSpeculative,
    trace: Trace,
    at: int,
    index_of: dict[int, int],
    clock: _Clock,
    full: int,
    total: Forecast,
) -> int:
    """Add a drafted chain and its verification to the forecast; return its number of tokens."""
    is_sorted, n = isinstance(strategy, SortedSpeculative), len(trace.tokens)
    depths = strategy.depths if is_sorted else (strategy.depth,)
    drafted = right = 0
    is_right = True
    for step in range(strategy.num_draft_tokens):
        where, by, is_confident = min(at + step, n - 1), depths[-1], not is_sorted
        for index, depth in enumerate(depths):
            clock.drafter.read(depth, 1)
            if is_sorted:
                clock.host_seconds += clock.host.confidence[strategy.measure]
                confidence = trace.confidence_dn[strategy.measure][index_of[depth]][where]
                if confidence > strategy.thresholds[index]:
                    by, is_confident = depth, True
                    break
        drafted += 1
        clock.add(1)
        is_right = is_right and trace.same_dn[index_of[by]][where]
        right += is_right
        if not is_confident:
            break
    clock.model.read(full, drafted + 1)
    clock.host_seconds += clock.host.chain + drafted * clock.host.draft
    clock.drop(drafted - right)
    clock.add(1)
    total.num_steps += 1
    total.num_drafted += drafted
    added = min(right + 1, n - at)
    total.num_accepted += min(right, added)
    total.num_same += added
    return added
