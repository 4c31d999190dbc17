"""Logits are changed as transformers changes them, and noise gives samples of a distribution."""

import math

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_sorted.confidence import certainty, highest_probability, margin
from megatron_sorted.decoding.sampling import Sampler, gumbel, keep_likely, penalise
from megatron_sorted.decoding.strategies import SamplingParameters
from megatron_sorted.errors import SettingsError


@pytest.mark.parametrize("top_k", [None, 1, 5, 200])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.7, 1.0])
def test_top_k_and_top_p_are_those_of_transformers(top_k, top_p):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 3
    logits[0, :7] = 9.0  # as likely as each other
    wanted = logits if top_k is None else TopKLogitsWarper(top_k)(None, logits)
    wanted = wanted if top_p is None else TopPLogitsWarper(top_p)(None, wanted)
    assert torch.equal(keep_likely(logits, top_k, top_p), wanted)


def test_penalty_and_temperature_are_those_of_transformers():
    logits, text = (
        torch.randn(2, 30, generator=torch.Generator().manual_seed(1)),
        torch.tensor([[3, 4, 3], [7, 8, 9]]),
    )
    seen = torch.zeros(2, 30, dtype=torch.bool).scatter_(1, text, True)
    wanted = RepetitionPenaltyLogitsProcessor(1.4)(text, logits.clone())
    assert torch.equal(penalise(logits, seen, 1.4), wanted)
    sampler = Sampler(SamplingParameters(temperature=0.7, repetition_penalty=1.4, seed=5), [0, 1])
    scores = sampler.scores(logits[:, None], [[4], [6]], seen[:, None])[:, 0]
    noise = torch.stack([gumbel(5, 0, 4, 30), gumbel(5, 1, 6, 30)])
    torch.testing.assert_close(
        (scores - noise).log_softmax(-1), TemperatureLogitsWarper(0.7)(text, wanted).log_softmax(-1)
    )


@pytest.mark.parametrize("temperature", [1e-30, 1e-45])
def test_a_very_low_temperature_takes_the_likeliest_token(temperature):
    logits = torch.tensor([[[3.0, 9.0, 12.0, 11.0, float("-inf")]]])
    for more in ({}, {"top_k": 3}, {"top_p": 0.9}):
        assert (
            Sampler(SamplingParameters(temperature, **more), [0]).choose(logits, [[7]]).item() == 2
        )


def test_a_hundred_thousand_choices_are_samples_of_the_distribution():
    logits, count = torch.tensor([2.0, 0.0, -1.0, 1.0, -3.0, 0.5]), 100_000
    noise = torch.stack(
        [gumbel(11, row, position, 6) for row in range(100) for position in range(count // 100)]
    )
    seen = torch.bincount((logits + noise).argmax(-1), minlength=6).double()
    expected = logits.double().softmax(-1) * count
    chi_square = float(((seen - expected).square() / expected).sum())
    assert chi_square < 20.5, (
        f"chi square {chi_square:.1f} with 5 degrees of freedom is above its 99.9 % point"
    )


def test_noise_of_neighbouring_places_seeds_and_rows_is_independent():
    base = gumbel(1, 0, 0, 4000)
    for other in (gumbel(1, 0, 1, 4000), gumbel(1, 1, 0, 4000), gumbel(2, 0, 0, 4000)):
        correlation = float(torch.corrcoef(torch.stack((base, other)))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(4000)


def test_a_row_does_not_depend_on_the_other_rows_of_the_batch():
    logits = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(2))
    positions = [[5, 6], [9, 10], [2, 3]]
    together = Sampler(SamplingParameters(temperature=1.0), [0, 1, 2]).choose(logits, positions)
    sampler = Sampler(SamplingParameters(temperature=1.0), [0, 1, 2])
    sampler.select_rows([2])
    assert torch.equal(sampler.choose(logits[2:], positions[2:]), together[2:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0 is not 0 or more"),
        ({"temperature": math.inf}, "temperature: inf is not 0 or more"),
        ({"temperature": math.nan}, "temperature: nan is not 0"),
        ({"top_k": 0}, "top_k: 0 is not 1 or more"),
        ({"top_p": 0.0}, "top_p: 0.0 is not above 0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 is not above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        SamplingParameters(**values)


def test_measures_of_confidence():
    p = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    assert highest_probability(p.log() + 4).tolist() == pytest.approx([0.7, 1 / 3])
    assert margin(p.log() + 4).tolist() == pytest.approx([0.5, 0.0], abs=1e-12)
    entropy = -sum(x * math.log(x) for x in (0.7, 0.2, 0.1))
    assert certainty(p.log() + 4).tolist() == pytest.approx(
        [1 - entropy / math.log(3), 0.0], abs=1e-6
    )
    assert certainty(torch.tensor([0.0, float("-inf")])) == 1.0
