"""The proof of decoding finds wrong tokens and biased samples, and nothing else."""

import dataclasses
import random

import pytest
import torch

from lab.decoding import proof
from lab.decoding.proof import (
    Draws,
    compare,
    draw_strategy,
    fit,
    greedy_draft_pairs,
    pairs_expected,
    sample_pairs,
)
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.requested_strategy import check_strategy
from megatron_sorted.decoding.strategies import (
    SamplingParameters,
    SelfSpeculative,
    TreeSpeculative,
    draft_depths,
)
from tests.support.decoding import needs_native, plain_network

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 6], [4, 4]]


def letters(tokens):
    return "".join(chr(97 + token % 26) for token in tokens)


@pytest.fixture(scope="module")
def network():
    return plain_network("llama")[1]


def test_all_drawn_strategies_are_supported(network):
    chance = random.Random(0)
    strategies = [draw_strategy(chance, network.depths[:-1]) for _ in range(300)]
    for strategy in strategies:
        check_strategy(strategy, network)
    assert {strategy.name for strategy in strategies} == {
        "self_speculative",
        "sorted_speculative",
        "tree",
    }
    assert {depth for strategy in strategies for depth in draft_depths(strategy)} == set(
        network.depths[:-1]
    )


@pytest.mark.parametrize(
    "kind", [None, *(pytest.param(kind, marks=needs_native) for kind in ("bfloat16", "int8"))]
)
def test_nothing_differs_and_texts_end_in_every_manner(kind):
    _, network = plain_network("llama", kind=kind)
    result = compare(network, PROMPTS, 1500, seed=1, draws=Draws(24, frozenset({1, 2}), letters))
    assert result.num_tokens >= 1500 and result.num_same == result.num_tokens
    assert not result.differences
    assert set(result.finishes) == {"eos", "stop", "length"} and set(result.by_strategy) == {
        "self_speculative",
        "sorted_speculative",
        "tree",
    }
    assert 0 < result.accepted < result.drafted


def test_a_wrong_token_is_detected(network, monkeypatch):
    def slipped(network, prompts, strategy, sampling=None, limits=None, draft=None):
        texts = generate(network, prompts, strategy, sampling, limits, draft)
        if strategy.name == "tree" and len(texts[0].tokens) > 3:
            texts[0] = dataclasses.replace(
                texts[0],
                tokens=[*texts[0].tokens[:3], (texts[0].tokens[3] + 1) % 8, *texts[0].tokens[4:]],
            )
        return texts

    monkeypatch.setattr(proof, "generate", slipped)
    result = compare(network, PROMPTS, 600, seed=1, draws=Draws(24, sampled=0.0))
    assert result.differences and all(
        one.strategy.name == "tree" and one.place == 3 for one in result.differences
    )
    assert result.num_same < result.num_tokens
    assert all(one.margin >= 0 for one in result.differences)


def test_a_chi_square_is_that_of_the_tables():
    expected = {(0, 0): 0.5, (0, 1): 0.5}
    one = fit(
        {(0, 0): 5098, (0, 1): 4902}, expected
    )  # (98^2 + 98^2) / 5000 = 3.8416: 5 % with one degree of freedom
    assert (
        one.chi_square == pytest.approx(3.8416)
        and one.p == pytest.approx(0.05, abs=1e-4)
        and one.cells == 2
    )
    assert fit({(0, 0): 5000, (0, 1): 4999, (1, 1): 1}, expected).p == 0.0, (
        "a pair that cannot come"
    )
    rare = {(0, 0): 0.999, **{(1, place): 0.0001 for place in range(10)}}
    assert fit({(0, 0): 9990, (1, 3): 10}, rare).cells == 2, "rare pairs are counted together"


@pytest.mark.parametrize("strategy", [SelfSpeculative(1, 2), TreeSpeculative((1,), (), 2, 3, 6)])
def test_samples_are_of_the_full_models_distribution_and_biased_ones_are_not(network, strategy):
    sampling = SamplingParameters(1.0, 6)
    expected = pairs_expected(network, PROMPTS[0], sampling)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5) and len(expected) == 36
    assert fit(sample_pairs(network, PROMPTS[0], strategy, sampling, 2000), expected).p > 1e-4
    assert fit(greedy_draft_pairs(network, PROMPTS[0], 1, sampling, 1000), expected).p < 1e-4


def test_margins_are_read_from_the_full_model(network):
    logits = proof.next_logits(network, [5, 9, 2])
    with torch.inference_mode():
        wanted = network.model(torch.tensor([[5, 9, 2]])).logits[0, -1]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
