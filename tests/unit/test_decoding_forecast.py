"""Traces hold the exits' choices in the full model's texts; forecasts equal counts of real runs."""

import pytest

from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.requested_strategy import check_strategy
from megatron_sorted.decoding.strategies import (
    EarlyExit,
    Fixed,
    Full,
    SamplingParameters,
    SelfSpeculative,
    SortedSpeculative,
)
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.decoding.tuning import costs as costs_module
from megatron_sorted.decoding.tuning.costs import Costs, measure_costs
from megatron_sorted.decoding.tuning.forecast import forecast
from megatron_sorted.decoding.tuning.search import Bandit, Tuner
from megatron_sorted.decoding.tuning.traces import Trace, record
from tests.support.decoding import last_logits, plain_network, prompts

DEPTHS, LENGTH = [1, 2, 3], 40
UNIT = Costs(
    (1, 64), dict.fromkeys((1, 2, 3, 4), (1.0, 64.0)), dict.fromkeys((1, 2, 3, 4), (0.5, 0.5))
)
"""A layer costs 1 a token, a head 0.5 however many tokens."""
FLAT = Costs(
    (1, 64), dict.fromkeys((1, 2, 3, 4), (1.0, 1.0)), dict.fromkeys((1, 2, 3, 4), (0.1, 0.1))
)
"""Reading many tokens costs what one costs: a machine that waits for its memory."""

TARGET = Costs((1, 64), {4: (100.0, 6400.0)}, {4: (7.0, 7.0)})
"""A large model for which another drafts: it is never left early."""


@pytest.fixture(scope="module")
def recorded():
    case, network = plain_network("llama")
    texts = prompts((6, 15, 9), 100)
    return case, network, texts, record(network, texts, DEPTHS, limits=Limits(LENGTH))


def test_traces_are_the_exits_choices(recorded):
    case, _, texts, traces = recorded
    for text, trace in zip(texts, traces, strict=True):
        for at in (0, 7, LENGTH - 1):
            for index, depth in enumerate(DEPTHS):
                logits = last_logits(case, depth, [*text, *trace.tokens[:at]])
                assert trace.same_dn[index][at] == (int(logits.argmax()) == trace.tokens[at])
                p = logits.softmax(-1).sort(descending=True).values
                assert trace.confidence_dn["probability"][index][at] == pytest.approx(
                    float(p[0]), rel=1e-3
                )
                assert trace.confidence_dn["margin"][index][at] == pytest.approx(
                    float(p[0] - p[1]), abs=1e-4
                )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "strategy", [SelfSpeculative(1, 3), SelfSpeculative(3, 7), SortedSpeculative((2,), (0.0,), 4)]
)
def test_steps_and_drafts_are_those_of_a_run(recorded, strategy, temperature):
    _, network, texts, _ = recorded
    sampling = SamplingParameters(temperature, seed=2)
    traces = record(network, texts, DEPTHS, sampling, Limits(LENGTH))
    total = forecast(strategy, traces, DEPTHS, UNIT, 4)
    runs = [generate(network, [text], strategy, sampling, Limits(LENGTH))[0] for text in texts]
    assert total.num_tokens == 3 * LENGTH == total.num_same
    assert total.num_steps == sum(run.counts.num_steps for run in runs)
    assert total.num_drafted == sum(run.counts.num_drafted for run in runs)
    assert total.num_accepted == sum(run.counts.num_accepted for run in runs)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "strategy", [SelfSpeculative(1, 3), SelfSpeculative(4, 5), SortedSpeculative((2,), (0.0,), 4)]
)
def test_steps_and_drafts_are_those_of_a_run_where_another_model_drafts(
    recorded, strategy, temperature
):
    _, network, texts, _ = recorded
    _, draft = plain_network("llama", 0.2)
    sampling = SamplingParameters(temperature, seed=2)
    traces = record(network, texts, draft.depths, sampling, Limits(LENGTH), draft)
    total = forecast(strategy, traces, draft.depths, TARGET, 4, UNIT)
    runs = [
        generate(network, [text], strategy, sampling, Limits(LENGTH), draft)[0] for text in texts
    ]
    assert [trace.tokens for trace in traces] == [
        run.tokens for run in runs
    ] and total.num_same == 3 * LENGTH
    assert total.num_steps == sum(run.counts.num_steps for run in runs)
    assert total.num_drafted == sum(run.counts.num_drafted for run in runs)
    assert total.num_accepted == sum(run.counts.num_accepted for run in runs)
    assert 0 < total.num_accepted < total.num_drafted, "all drafts are alike: the test shows little"


def test_steps_of_another_models_drafts_are_counted_by_hand():
    trace = Trace([5, 6, 7, 8, 9], [[True, True, False, False, True], [True] * 5], {})
    total = forecast(SelfSpeculative(1, 2), [trace], [1, 2], TARGET, 4, UNIT)
    # the draft model processes 1 + 1 tokens, both right; then the one it lacks and the full model's
    # own, and 1, both wrong; then 1 + 1
    drafting = (1 + 1 + 2 * 0.5) + (2 + 1 + 2 * 0.5) + (1 + 1 + 2 * 0.5)
    # each time the full model processes the last token of the text and both drafts
    assert total.seconds == pytest.approx(drafting + 3 * (3 * 100 + 7))
    assert (total.num_steps, total.num_drafted, total.num_accepted, total.num_same) == (3, 6, 3, 5)
    sure = {"probability": [[0.9, 0.1, 0.1], [0.9, 0.2, 0.9]]}
    trace = Trace([5, 6, 7], [[True, False, True], [True, True, True]], sure)
    total = forecast(SortedSpeculative((1, 2), (0.5, 0.5), 4), [trace], [1, 2], TARGET, 4, UNIT)
    # exit 1 is confident in the first token; none is in the second, for which exit 2 processes both
    assert total.seconds == pytest.approx((1 + 0.5) + (1 + 0.5) + (2 + 0.5) + (3 * 100 + 7))
    assert (total.num_steps, total.num_drafted, total.num_accepted) == (1, 2, 2)
    assert forecast(Full(), [trace], [1, 2], TARGET, 4, UNIT).seconds == pytest.approx(3 * 107)


def test_costs_are_added_up(recorded):
    *_, traces = recorded
    assert forecast(Full(), traces, DEPTHS, UNIT, 4).seconds == pytest.approx(3 * LENGTH * 4.5)
    assert forecast(Fixed(2), traces, DEPTHS, UNIT, 4).seconds == pytest.approx(3 * LENGTH * 2.5)
    [first, *_] = traces
    one = forecast(SelfSpeculative(1, 2), [first], DEPTHS, UNIT, 4)
    # each layer that a drafted or committed token reached processes it exactly once
    read = one.num_tokens + one.num_drafted - one.num_accepted
    heads = one.num_drafted + one.num_steps
    # the last step may end behind the text
    assert one.seconds == pytest.approx(4 * read + 0.5 * heads, abs=4 * 3)


def test_early_exit_counts_what_differs(recorded):
    *_, traces = recorded
    never = forecast(EarlyExit((1, 3), (1.0, 1.0)), traces, DEPTHS, UNIT, 4)
    always = forecast(EarlyExit((1, 3), (0.0, 1.0)), traces, DEPTHS, UNIT, 4)
    right = sum(sum(trace.same_dn[0]) for trace in traces)
    assert never.share_same == 1.0 and always.num_same == right
    assert never.seconds == pytest.approx(
        3 * LENGTH * (4 + 1.5)
    ) and always.seconds == pytest.approx(3 * LENGTH * 1.5)


def test_the_tuner_finds_faster_strategies_that_the_model_supports(recorded):
    _, network, _, traces = recorded
    tuner = Tuner(traces, DEPTHS, FLAT, 4)
    fixed, adaptive = tuner.self_speculative(), tuner.sorted_speculative()
    assert fixed.expected.tokens_per_second > 1.1 * tuner.base.tokens_per_second
    assert adaptive.expected.tokens_per_second >= fixed.expected.tokens_per_second
    early = tuner.early_exit(0.8)
    assert (
        early.expected.share_same >= 0.8
        and early.expected.tokens_per_second > tuner.base.tokens_per_second
    )
    for strategy in (fixed.strategy, adaptive.strategy, early.strategy, *tuner.trees()):
        check_strategy(strategy, network)


def test_the_tuner_finds_strategies_with_a_draft_model(recorded):
    _, network, texts, _ = recorded
    _, draft = plain_network("llama", 0.2)
    traces = record(network, texts, draft.depths, limits=Limits(LENGTH), drafter=draft)
    tuner = Tuner(traces, draft.depths, Costs((1, 64), {4: (9.0, 9.0)}, {4: (0.1, 0.1)}), 4, FLAT)
    fixed, adaptive = tuner.self_speculative(), tuner.sorted_speculative()
    assert (
        adaptive.expected.tokens_per_second
        >= fixed.expected.tokens_per_second
        > 1.3 * tuner.base.tokens_per_second
    )
    for strategy in (fixed.strategy, adaptive.strategy, *tuner.trees()):
        check_strategy(strategy, network, draft)


def test_a_bandit_uses_the_faster_strategy_of_each_task():
    strategies, seconds = [Full(), SelfSpeculative(1, 4)], {"a": (1.0, 0.5), "b": (0.5, 1.0)}
    bandit, taken = Bandit(strategies), {"a": [0, 0], "b": [0, 0]}
    for turn in range(200):
        for task in seconds:
            if turn == 100:
                bandit = Bandit(strategies, bandit.state_dict())
            place = bandit.choose(task)
            bandit.learn(task, place, 10, seconds[task][place] * 10)
            taken[task][place] += 1
    assert taken["a"][1] > 170 and taken["b"][0] > 170 and min(*taken["a"], *taken["b"]) >= 1


def test_a_strategy_that_fails_is_tried_more_and_more_rarely():
    bandit, tried = Bandit([SelfSpeculative(1, 4), Full()]), []
    for turn in range(1200):
        place = bandit.choose("a")
        if place == 0:
            tried.append(turn)
            bandit.fail("a", place)
        else:
            bandit.learn("a", place, 10, 1.0)
    assert tried == [0, 11, 102, 1003]
    both = Bandit([SelfSpeculative(1, 4), Full()])
    for place in (0, 1, 0, 1):
        assert both.choose("a") == place
        both.fail("a", place)


@pytest.mark.parametrize("most_positions", [256, 40])
def test_measured_costs_are_those_of_the_processed_tokens(monkeypatch, most_positions):
    """A clock counts tokens times layers; one context is shorter than the widest pass."""
    _, network = plain_network("llama")
    clock, fill = [0], DecodingState._fill

    def counted(state, run):
        clock[0] += len(run.layers) * (state.lengths[0] - run.filled[0])
        fill(state, run)

    monkeypatch.setattr(DecodingState, "_fill", counted)
    monkeypatch.setattr(costs_module, "now", lambda network: clock[0])
    monkeypatch.setattr(Network, "max_positions", most_positions)
    costs = measure_costs(network, [1, 4], length=64, widths=(1, 64))
    assert costs.layers == {1: (1, 64), 4: (3, 192)} and costs.heads == {1: (0, 0), 4: (0, 0)}
    assert (
        costs.of_layers(4, 0) == 0
        and costs.of_layers(1, 128) == 128
        and costs.of_layers(4, 22) == 66
    )
