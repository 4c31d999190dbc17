"""Texts of all strategies: speculation gives the full model's, exits those of a plain loop."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.decoding import sampling as sampling_module
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import generate, stream
from megatron_sorted.decoding.sampling import gumbel
from megatron_sorted.decoding.speculation.steps import first_confident
from megatron_sorted.decoding.strategies import (
    EarlyExit,
    Fixed,
    Full,
    SamplingParameters,
    SelfSpeculative,
    SortedSpeculative,
    TreeSpeculative,
)
from megatron_sorted.decoding.texts import Limits
from tests.support.decoding import continue_greedily, last_logits, nested, plain_network, prompts

SPECULATIVE = [
    SelfSpeculative(1, 1),
    SelfSpeculative(2, 5),
    SelfSpeculative(3, 9),
    SortedSpeculative((1,), (0.5,), 4),
    SortedSpeculative((1, 2, 3), (0.6, 0.4, 0.2), 6),
    SortedSpeculative((2, 3), (0.9, 0.9), 12, "margin"),
    TreeSpeculative((1,)),
    TreeSpeculative((2,), (), 1, 3, 3),
    TreeSpeculative((1, 3), (0.5,), 4, 3, 7),
    TreeSpeculative((1,), (), 6, 1, 6),
    TreeSpeculative((2,), (), 3, 5, 40),
    TreeSpeculative((1, 2), (0.3,), 2, 6, 1, measure="entropy"),
    TreeSpeculative((2,), (), 5, 1, 8, 2),
    TreeSpeculative((1, 3), (0.4,), 4, 3, 9, 1),
]
NUM_TOKENS = 40


def name_of(strategy) -> str:
    return "-".join(map(str, (strategy.name, *vars(strategy).values())))


FAMILIES = ("llama", "mistral")
OTHER_FAMILY = pytest.mark.long(
    reason="all strategies run on llama, a third on mistral, whose window is shorter than the texts"
)


def of_families(strategies) -> list:
    """Return (family, strategy) as parameters of a test."""
    return [
        pytest.param(
            family,
            strategy,
            id=f"{family}-{name_of(strategy)}",
            marks=() if family == "llama" or number % 3 == 0 else OTHER_FAMILY,
        )
        for family in FAMILIES
        for number, strategy in enumerate(strategies)
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    model, network = plain_network(request.param)
    texts = prompts((11, 3, 24), 100)
    wanted = [
        continue_greedily(text, NUM_TOKENS, lambda whole: last_logits(model, 4, whole))
        for text in texts
    ]
    return network, texts, wanted


@pytest.mark.parametrize(
    ("case", "strategy"), of_families([Full(), *SPECULATIVE]), indirect=["case"]
)
def test_greedy_text_is_that_of_the_full_model_alone_and_in_a_batch(case, strategy):
    network, texts, wanted = case
    together = generate(network, texts, strategy, limits=Limits(NUM_TOKENS))
    assert [text.tokens for text in together] == wanted
    assert [
        generate(network, [text], strategy, limits=Limits(NUM_TOKENS))[0].tokens for text in texts
    ] == wanted
    for text in together:
        assert text.finish == "length" and len(text.counts.depths) == NUM_TOKENS
        assert text.counts.num_accepted <= text.counts.num_drafted
        if not isinstance(strategy, Full):
            assert (
                NUM_TOKENS - 1
                <= text.counts.num_accepted + text.counts.num_steps
                <= NUM_TOKENS + text.counts.num_steps
            )
    if not isinstance(strategy, Full) and strategy != SelfSpeculative(1, 1):
        assert sum(text.counts.num_accepted for text in together) > 20, (
            "drafts are never accepted: the test shows little"
        )


SAMPLINGS = {
    "all": SamplingParameters(0.7, top_k=8, top_p=0.9, repetition_penalty=1.3, seed=4),
    "plain": SamplingParameters(1.0, seed=3),
    "greedy penalty": SamplingParameters(0.0, repetition_penalty=1.5),
}
OTHERWISE = pytest.mark.long(
    reason="all strategies sample with all rules, and a third of them with each rule alone"
)


@pytest.mark.parametrize(
    ("case", "strategy", "sampling"),
    [
        pytest.param(
            family,
            strategy,
            sampling,
            id=f"{family}-{name}-{name_of(strategy)}",
            marks=OTHERWISE
            if name != "all" and number % 3 != place
            else OTHER_FAMILY
            if family != "llama" and number % 3
            else (),
        )
        for family in FAMILIES
        for place, (name, sampling) in enumerate(SAMPLINGS.items())
        for number, strategy in enumerate(SPECULATIVE)
    ],
    indirect=["case"],
)
def test_sampled_text_is_that_of_the_full_model_with_the_same_seed(case, strategy, sampling):
    network, texts, _ = case
    wanted = [
        text.tokens for text in generate(network, texts, Full(), sampling, Limits(NUM_TOKENS))
    ]
    together = generate(network, texts, strategy, sampling, Limits(NUM_TOKENS))
    assert [text.tokens for text in together] == wanted
    assert (
        generate(network, texts[:1], strategy, sampling, Limits(NUM_TOKENS))[0].tokens == wanted[0]
    )


def test_sampled_text_is_what_a_plain_loop_samples():
    model, network = plain_network("llama")
    [prompt] = prompts((9,), 100)
    settings = SamplingParameters(0.8, repetition_penalty=1.3, seed=6)

    def after(text):
        logits = last_logits(model, 4, text)
        seen = torch.zeros(100, dtype=torch.bool)
        seen[text] = True
        logits = torch.where(seen, torch.where(logits > 0, logits / 1.3, logits * 1.3), logits)
        return logits / 0.8 + gumbel(6, 0, len(text), 100)

    assert generate(network, [prompt], Full(), settings, Limits(30))[0].tokens == continue_greedily(
        prompt, 30, after
    )


@pytest.mark.parametrize("depth", [1, 3])
def test_a_fixed_exit_is_the_sub_model(case, depth):
    network, texts, _ = case
    model, _ = plain_network(network.model.config.model_type)
    wanted = [
        continue_greedily(text, 20, lambda whole: last_logits(model, depth, whole))
        for text in texts
    ]
    assert [
        text.tokens for text in generate(network, texts, Fixed(depth), limits=Limits(20))
    ] == wanted


@pytest.mark.parametrize("measure", CONFIDENCE)
def test_tokens_exit_at_the_first_confident_exit(measure):
    model, network = plain_network("mistral")
    texts, wanted, depths = prompts((7, 19), 100), [], []
    some = torch.tensor(prompts((60,), 100))
    thresholds = tuple(
        float(CONFIDENCE[measure](model.logits(depth, some)[0]).quantile(0.6)) for depth in (1, 3)
    )
    for prompt in texts:
        whole, by = list(prompt), []
        for _ in range(30):
            for depth, threshold in ((1, thresholds[0]), (3, thresholds[1]), (4, -1)):
                logits = last_logits(model, depth, whole)
                if CONFIDENCE[measure](logits) > threshold:
                    break
            whole.append(int(logits.argmax()))
            by.append(depth)
        wanted.append(whole[len(prompt) :])
        depths.append(by)
    early = generate(network, texts, EarlyExit((1, 3), thresholds, measure), limits=Limits(30))
    assert [text.tokens for text in early] == wanted
    assert [text.counts.depths for text in early] == depths
    assert {1, 3, 4} == set(itertools.chain(*depths)), (
        "every exit must be used, or the test shows little"
    )


@pytest.mark.parametrize("kind", ["block", "adapter and block", "mlp"])
@pytest.mark.parametrize(
    "strategy",
    [
        SelfSpeculative(1, 4),
        SortedSpeculative((1, 3), (0.5, 0.2), 5),
        TreeSpeculative((1, 3), (0.4,), 3, 3, 6),
    ],
    ids=name_of,
)
def test_exits_with_their_own_parts_draft(kind, strategy, tmp_path):
    case, network = nested(tmp_path, "qwen3", kind, norms=True)
    texts = prompts((5, 12), 100)
    wanted = [
        continue_greedily(text, 20, lambda whole: last_logits(case, 4, whole)) for text in texts
    ]
    assert [text.tokens for text in generate(network, texts, strategy, limits=Limits(20))] == wanted


def test_a_draft_model_is_resized_to_another_vocabulary_size():
    _, network = plain_network("llama")
    texts, limits = prompts((5, 12), 90), Limits(30)
    larger, smaller = network.resized(130), network.resized(90)
    states = [DecodingState(one, 1, 8, (2,)) for one in (network, larger, smaller)]
    for state in states:
        state.append(torch.tensor([texts[0]]))
        state.read(2)
    here, more, fewer = (state.logits(2, state.last_slots())[0, 0] for state in states)
    torch.testing.assert_close(more[:100], here)
    torch.testing.assert_close(fewer, here[:90])
    assert more.size(0) == 130 and bool((more[100:] == float("-inf")).all())
    wanted = [text.tokens for text in generate(larger, texts, Full(), limits=limits)]
    assert wanted == [text.tokens for text in generate(network, texts, Full(), limits=limits)], (
        "new tokens are never chosen"
    )
    assert [
        text.tokens
        for text in generate(
            larger, texts, SelfSpeculative(2, 4), limits=limits, draft=smaller.resized(130)
        )
    ] == wanted


@pytest.mark.parametrize(
    "strategy",
    [
        SelfSpeculative(2, 4),
        SortedSpeculative((1, 2), (0.5, 0.2), 5),
        TreeSpeculative((1, 2), (0.4,), 3, 3, 6),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_another_model_drafts(strategy, temperature):
    (_, draft), (_, network) = plain_network("qwen3"), plain_network("llama")
    texts, settings, limits = prompts((5, 12, 8), 100), SamplingParameters(temperature), Limits(30)
    wanted = [text.tokens for text in generate(network, texts, Full(), settings, limits)]
    assert [
        text.tokens for text in generate(network, texts, strategy, settings, limits, draft)
    ] == wanted
    deepest = replace(
        strategy, **({"depth": 4} if hasattr(strategy, "depth") else {"depths": (2, 4)})
    )
    itself = generate(network, texts, deepest, settings, limits, network)
    assert [text.tokens for text in itself] == wanted
    assert sum(text.counts.num_accepted for text in itself) > 30, (
        "a model that drafts for itself is right nearly always"
    )


@pytest.mark.parametrize("strategy", [Full(), *SPECULATIVE[1::3]], ids=name_of)
def test_texts_end_at_end_tokens_stop_texts_and_the_limit(case, strategy):
    network, texts, wanted = case
    to_text = " ".join
    for row, cut_at in enumerate((17, 5, 30)):
        token = wanted[row][cut_at]
        first = wanted[row].index(token)
        [ended] = generate(
            network, [texts[row]], strategy, limits=Limits(NUM_TOKENS, frozenset({token}))
        )
        assert (ended.tokens, ended.finish) == (wanted[row][: first + 1], "eos")
        word = " ".join(map(str, wanted[row][cut_at - 1 : cut_at + 1]))
        limits = Limits(NUM_TOKENS, stop=(word,), to_text=lambda tokens: to_text(map(str, tokens)))
        [stopped] = generate(network, [texts[row]], strategy, limits=limits)
        assert (
            stopped.finish == "stop"
            and stopped.tokens == wanted[row][: len(stopped.tokens)]
            and len(stopped.tokens) <= cut_at + 1
        )
        assert to_text(map(str, stopped.tokens)).endswith(word)
        for limit in (1, 2, 13):
            [short] = generate(network, [texts[row]], strategy, limits=Limits(limit))
            assert (short.tokens, short.finish) == (wanted[row][:limit], "length")
    ends = frozenset({wanted[0][9], wanted[1][2]})
    alone = [
        generate(network, [text], strategy, limits=Limits(NUM_TOKENS, ends))[0] for text in texts
    ]
    together = generate(network, texts, strategy, limits=Limits(NUM_TOKENS, ends))
    assert [(text.tokens, text.finish) for text in together] == [
        (text.tokens, text.finish) for text in alone
    ]


@pytest.mark.parametrize(
    ("active", "read", "by"),
    [(None, [1, 2], [-2, 1]), ([False, True], [1], [1, 1]), ([True, False], [1, 2], [-2, 1])],
)
def test_no_exit_is_evaluated_for_a_row_whose_draft_has_ended(active, read, by):
    """No exit is confident in the first row; the first one is in the second row."""
    logits, evaluated = torch.tensor([[0.0, 0.1], [0.0, 9.0]]), []
    state = SimpleNamespace(num_rows=2, last_slots=lambda: None)
    batch = SimpleNamespace(choose_last=lambda *_: logits.argmax(-1))
    choosing = first_confident(
        batch, state, [1, 2], [0.9, 0.9], CONFIDENCE["probability"], None, active
    )
    with pytest.raises(StopIteration) as end:
        needed = next(choosing)
        while True:
            evaluated.append(needed.depth)
            needed = choosing.send(logits[:, None])
    tokens, exits = end.value.value
    assert (evaluated, exits) == (read, by) and tokens.tolist() == [1, 1]


def test_a_stream_yields_the_text_step_by_step(case):
    network, texts, wanted = case
    streamed: list[list[int]] = [[], [], []]
    for added in stream(network, texts, SelfSpeculative(2, 5), limits=Limits(NUM_TOKENS)):
        assert added.tokens and len(added.tokens) == len(added.depths)
        streamed[added.row] += added.tokens
    assert streamed == wanted


@pytest.mark.parametrize(
    "strategy",
    [
        SelfSpeculative(1, 2),
        SortedSpeculative((1, 2), (0.4, 0.3), 2),
        TreeSpeculative((1,), (), 2, 2, 3),
    ],
    ids=name_of,
)
def test_over_all_noises_the_distribution_of_texts_is_the_full_models(strategy, monkeypatch):
    """All outcomes of a small vocabulary and three noises at each position are enumerated."""
    _, network = plain_network("llama")
    allowed, kinds, length = 6, 3, 4
    table = torch.stack([gumbel(1, kind, 0, 100) for kind in range(kinds)])
    table[:, allowed:] = float("-inf")
    [prompt], now = prompts((5,), 100), {}
    monkeypatch.setattr(
        sampling_module,
        "gumbel",
        lambda seed, row, position, size: table[now["kinds"][(position - len(prompt)) % length]],
    )
    counts: dict[str, dict] = {"full": {}, "strategy": {}}
    for noise in itertools.product(range(kinds), repeat=length):
        now["kinds"] = noise
        for name, which in (("full", Full()), ("strategy", strategy)):
            [text] = generate(network, [prompt], which, SamplingParameters(1.0), Limits(length))
            key = tuple(text.tokens)
            counts[name][key] = counts[name].get(key, 0) + 1
    assert counts["strategy"] == counts["full"] and len(counts["full"]) > 20
