"""Forecasts against a second count of every pass, and against runs on a clock; races in turns."""

import random
from itertools import pairwise

import pytest

from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.sampling import Sampler
from megatron_sorted.decoding.strategies import EarlyExit, Full, SelfSpeculative, SortedSpeculative
from megatron_sorted.decoding.texts import Limits, Text
from megatron_sorted.decoding.tuning import costs as costs_module
from megatron_sorted.decoding.tuning import races, tune
from megatron_sorted.decoding.tuning.costs import Costs, HostCosts, measure_costs
from megatron_sorted.decoding.tuning.forecast import forecast
from megatron_sorted.decoding.tuning.races import Speed, race
from megatron_sorted.decoding.tuning.search import Tuner
from megatron_sorted.decoding.tuning.traces import Trace, record
from megatron_sorted.decoding.tuning.tune import Tuning, cost_lines
from tests.support.decoding import needs_native, plain_network, prompts

EXITS, FULL, MOST = (2, 5), 9, 80


def random_case(seed: int, has_blocks: bool) -> tuple[Trace, Costs]:
    """Return the exits' choices in a text, and costs that are no line in the number of tokens."""
    draw = random.Random(seed)
    n = draw.randint(1, 60)
    trace = Trace(
        [0] * n,
        [[draw.random() < share for _ in range(n)] for share in (0.6, 0.8)],
        {"margin": [[draw.random() for _ in range(n)] for _ in EXITS]},
    )

    def table(depths) -> dict[int, tuple[float, ...]]:
        return {depth: tuple(draw.random() for _ in range(MOST)) for depth in depths}

    host = HostCosts(draw.random(), draw.random(), draw.random(), {"margin": draw.random()})
    blocks = table((*EXITS, FULL)) if has_blocks else {}
    drafts = {depth: draw.random() for depth in EXITS}
    widths = tuple(range(1, MOST + 1))
    return trace, Costs(widths, table((*EXITS, FULL)), table((*EXITS, FULL)), blocks, drafts, host)


class Reference:
    """A text whose slots each segment has processed or not; slot i chooses token i."""

    def __init__(self, costs: Costs):
        self.costs, self.seconds, self.newest = costs, 0.0, None
        self.done = {("layers", depth): set() for depth in costs.layers}
        self.done |= {("blocks", depth): set() for depth in costs.blocks}

    def read(self, depth: int, end: int, heads: int) -> None:
        """Process the slots up to ``end`` by all parts below an exit, and run its head."""
        parts = [("layers", stop) for stop in sorted(self.costs.layers) if stop <= depth]
        parts += [("blocks", depth)] if ("blocks", depth) in self.done else []
        missing = [set(range(end)) - self.done[part] for part in parts]
        if (
            heads == 1
            and self.newest == depth
            and all(len(one) == 1 for one in missing)
            and depth in self.costs.drafts
        ):
            self.seconds += self.costs.drafts[depth]
        else:
            for (kind, stop), slots in zip(parts, missing, strict=True):
                if slots:
                    self.seconds += getattr(self.costs, kind)[stop][len(slots) - 1]
            self.seconds += self.costs.heads[depth][heads - 1]
        for part in parts:
            self.done[part] |= set(range(end))
        self.newest = depth

    def crop(self, end: int) -> None:
        """Forget what stands behind the text."""
        for slots in self.done.values():
            slots.intersection_update(range(end))


def speculated(strategy, trace: Trace, costs: Costs) -> tuple[int, int, float]:
    """Return the steps, drafted tokens and seconds of a strategy that drafts."""
    text, size, steps, drafts = Reference(costs), 1, 0, 0
    is_sorted, last = isinstance(strategy, SortedSpeculative), len(trace.tokens) - 1
    while size <= len(trace.tokens):
        is_same, length = [], size
        for _ in range(strategy.num_draft_tokens):
            token, is_sure = min(length - 1, last), not is_sorted
            for depth in strategy.depths if is_sorted else (strategy.depth,):
                text.read(depth, length, 1)
                if is_sorted:
                    text.seconds += costs.host.confidence["margin"]
                    limit = strategy.thresholds[strategy.depths.index(depth)]
                    is_sure = trace.confidence_dn["margin"][EXITS.index(depth)][token] > limit
                if is_sure:
                    break
            is_same.append(trace.same_dn[EXITS.index(depth)][token])
            length += 1
            if not is_sure:
                break
        text.read(FULL, length, length - size + 1)
        text.seconds += costs.host.chain + costs.host.draft * len(is_same)
        accepted = [*is_same, False].index(False)
        text.crop(size + accepted)
        size, steps, drafts = size + accepted + 1, steps + 1, drafts + len(is_same)
    return steps, drafts, text.seconds


@pytest.mark.parametrize("seed", range(40))
def test_forecasts_of_drafts_are_those_of_a_second_count(seed):
    trace, costs = random_case(seed, seed % 2 == 1)
    draw = random.Random(seed)
    for strategy in (
        SelfSpeculative(2, draw.randint(1, 16)),
        SelfSpeculative(5, draw.randint(1, 16)),
        SortedSpeculative((5,), (draw.random(),), draw.randint(1, 16), "margin"),
        SortedSpeculative((2, 5), (draw.random(), draw.random()), draw.randint(1, 16), "margin"),
    ):
        total = forecast(strategy, [trace], list(EXITS), costs, FULL)
        steps, drafts, seconds = speculated(strategy, trace, costs)
        assert (total.num_steps, total.num_drafted) == (steps, drafts)
        assert total.num_tokens / total.num_steps == len(trace.tokens) / steps
        assert total.seconds == pytest.approx(seconds)


@pytest.mark.parametrize("seed", range(20))
def test_forecasts_of_early_exits_are_those_of_a_second_count(seed):
    trace, costs = random_case(seed, seed % 2 == 1)
    strategy = EarlyExit(EXITS, (0.5, 0.3), "margin")
    total, text, same = forecast(strategy, [trace], list(EXITS), costs, FULL), Reference(costs), 0
    for slot in range(len(trace.tokens)):
        for index, (depth, limit) in enumerate(zip(EXITS, strategy.thresholds, strict=True)):
            text.read(depth, slot + 1, 1)
            text.seconds += costs.host.confidence["margin"]
            if trace.confidence_dn["margin"][index][slot] > limit:
                same += trace.same_dn[index][slot]
                break
        else:
            text.read(FULL, slot + 1, 1)
            same += 1
        text.seconds += costs.host.token
    assert total.seconds == pytest.approx(text.seconds) and total.num_same == same


@pytest.fixture
def clock(monkeypatch):
    """Replace time by what passes, choices and appended tokens take; return it as a list."""
    clock = [0.0]

    def taking(kind: type, name: str, seconds) -> None:
        work = getattr(kind, name)

        def timed(self, *arguments, **more):
            clock[0] += seconds(self, *arguments)
            return work(self, *arguments, **more)

        monkeypatch.setattr(kind, name, timed)

    def of_layers(state, segment) -> float:
        count = state.lengths[0] - segment.filled[0]
        # a second token costs little; beyond eight the weights are read again
        return len(segment.layers) * (1 + 0.1 * count + (count > 8)) if count > 0 else 0.0

    taking(DecodingState, "_fill", of_layers)
    taking(DecodingState, "logits", lambda state, depth, slots: 0.6 + 0.05 * slots.size(1))
    taking(DecodingState, "append", lambda *_: 0.1)
    taking(Sampler, "choose", lambda *_: 0.2)
    monkeypatch.setattr(costs_module, "now", lambda network: clock[0])
    monkeypatch.setattr(costs_module, "MAX_ROUNDS", 1)
    return clock


@pytest.mark.parametrize("kind", ["torch", pytest.param("int8", marks=needs_native)])
def test_forecasts_are_the_times_of_runs(clock, kind):
    _, network = plain_network("llama", kind=kind)
    depths, limits = [1, 2, 3], Limits(48)
    # a prompt of one token: its pass is that of a step
    texts = prompts((1, 1, 1), 100)
    traces = record(network, texts, depths, limits=limits)
    costs = measure_costs(network, [*depths, 4], length=32, drafting=depths)
    assert costs.host.draft > 0.2 and costs.host.token == pytest.approx(0.3)
    middle = sorted(traces[0].confidence_dn["margin"][0])[24]
    for strategy in (
        Full(),
        SelfSpeculative(1, 2),
        SelfSpeculative(3, 5),
        SelfSpeculative(2, 12),
        SortedSpeculative((1, 3), (middle, 0.0), 6, "margin"),
        EarlyExit((1, 3), (middle, middle), "margin"),
    ):
        began = clock[0]
        for text in texts:
            generate(network, [text], strategy, limits=limits)
        run = clock[0] - began
        assert forecast(strategy, traces, depths, costs, 4).seconds == pytest.approx(run, rel=0.1)
    blind = Costs(costs.widths, costs.layers, costs.heads)
    assert forecast(Full(), traces, depths, blind, 4).seconds < 0.95 * 3 * 48 * (4.4 + 0.65 + 0.3)


def test_the_search_follows_the_costs():
    """What a verification of more tokens costs decides how many are drafted, and whether any."""
    draw = random.Random(0)
    traces = [
        Trace(
            [0] * 200,
            [[draw.random() < 0.8 for _ in range(200)]],
            {name: [[0.5] * 200] for name in ("probability", "margin", "entropy")},
        )
    ]

    def best(more: float, host: float):
        widths = tuple(range(1, 18))
        layers = {2: (0.2,) * 17, 10: tuple(0.8 + more * (width - 1) for width in widths)}
        heads = {2: (0.01,) * 17, 10: (0.01,) * 17}
        tuner = Tuner(traces, [2], Costs(widths, layers, heads, host=HostCosts(0, host, host)), 10)
        choice = tuner.self_speculative()
        return choice.strategy.num_draft_tokens, tuner.speed_up(choice.strategy)

    lengths, speed_ups = zip(*(best(more, 0.0) for more in (0.0, 0.1, 1.0)), strict=True)
    assert all(left > right for left, right in pairwise(lengths)), lengths
    assert speed_ups[0] > 1.5 and speed_ups[-1] < 1.0
    assert best(0.0, 0.1)[0] < lengths[0], "each drafted token costs the host something too"


class Writer:
    """Stands for a generator whose strategies take given seconds."""

    network, draft = None, None

    def __init__(self, monkeypatch, seconds):
        self.seconds, self.taken, self.clock = seconds, [], [0.0]
        monkeypatch.setattr(races, "generate", self.generate)
        monkeypatch.setattr(races.time, "perf_counter", lambda: self.clock[0])

    def draft_for(self, strategy):
        return None

    def generate(self, network, prompts, strategy, limits, draft):
        self.taken.append((strategy, prompts[0], limits.max_new_tokens))
        self.clock[0] += self.seconds(strategy, len(self.taken))
        text = Text([1] * limits.max_new_tokens)
        text.counts.num_steps = limits.max_new_tokens // 2
        return [text]


def test_strategies_run_in_turns_and_a_slow_moment_does_not_count(monkeypatch):
    slow = SelfSpeculative(1, 1)
    # the second text of the first strategy meets a pause of the machine
    writer = Writer(monkeypatch, lambda strategy, call: 1 + (strategy == slow) + 90 * (call == 3))
    speeds = race(writer, [Full(), slow], [[7], [8]], Limits(20), "title", rounds=3)
    assert speeds == [Speed(20.0, 2.0), Speed(10.0, 2.0)]
    warm, rest = writer.taken[:2], writer.taken[2:]
    assert {one[2] for one in warm} == {8} and [one[1] for one in rest] == [[7]] * 6 + [[8]] * 6
    order = [strategy == slow for strategy, *_ in rest]
    assert order == [False, True, True, False] * 3, "each strategy begins as often"


def tuning_of(monkeypatch, *rounds: dict[str, float]) -> Tuning:
    """Return a tuning whose races have these speeds by strategy, one after the other."""
    tuning, results = Tuning.__new__(Tuning), list(rounds)

    def canned(generator, strategies, *arguments, **more):
        speeds = results.pop(0)
        return [Speed(speeds[strategy.name], 1.0) for strategy in strategies]

    monkeypatch.setattr(tune, "race", canned)
    tuning.generator, tuning.prompts, tuning.limits = None, [[1]], Limits(8)
    tuning.best = "full"
    tuning.choices = {
        "full": Full(),
        "self_speculative": SelfSpeculative(1),
        "early_exit": EarlyExit((1,), (0.9,)),
    }
    speeds = canned(None, tuning.choices.values())
    tuning.speeds = dict(zip(tuning.choices, speeds, strict=True))
    tuning._confirm()
    assert not results, "a race was not run"
    return tuning


def test_only_a_strategy_that_beats_full_twice_is_the_best(monkeypatch):
    first = {"full": 10.0, "self_speculative": 11.0, "early_exit": 30.0}
    lucky = tuning_of(monkeypatch, first, {"full": 20.0, "self_speculative": 19.0})
    assert lucky.best == "full" and lucky.speed("self_speculative") == 19
    assert lucky.speed("early_exit") == 60, "it keeps its ratio to full"
    faster = tuning_of(monkeypatch, first, {"full": 20.0, "self_speculative": 21.0})
    assert faster.best == "self_speculative"
    slower = tuning_of(monkeypatch, {**first, "self_speculative": 9.0})
    assert slower.best == "full"


def test_the_table_of_costs_is_relative_to_one_token():
    _, network = plain_network("llama", kind="torch")
    layers = {1: (1.0, 2.0, 3.0), 4: (2.0, 2.0, 5.0)}
    heads = dict.fromkeys((1, 4), (1.0, 1.0, 2.0))
    costs = Costs((1, 2, 4), layers, heads, drafts={1: 1.0}, host=HostCosts(0.5))
    lines = cost_lines(costs, network)
    assert lines[0].startswith("float32 by torch, threads: ") and "4000.00 ms" in lines[0]
    assert lines[1].split() == ["tokens", "2", "3", "4"]
    assert lines[2].split() == ["cost", "1.25", "1.88", "2.50"]
    assert lines[3] == "a token of exit 1: 0.25" and "500.000 ms" in lines[4]
