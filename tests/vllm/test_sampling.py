"""Sampling with speculation has the target's distribution; vLLM's own on a CPU has not."""

from collections import Counter

import pytest
import torch

from megatron_sorted.serving.vllm.options import EngineOptions
from tests.vllm.engine import engine, generate
from tests.vllm.models import VOCABULARY, extract_by_hand, reference, write_model

PROMPT, SAMPLES = [3, 17, 42, 8], 3000
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model that is unsure, so that many tokens are likely."""
    return write_model(tmp_path_factory.mktemp("flat") / "model", initializer_range=0.08)


def pairs(llm, **sampling) -> Counter:
    """Return how often each pair of second and third tokens was sampled."""
    texts = generate(
        llm, [PROMPT] * SAMPLES, 4, **{"temperature": TEMPERATURE, "seed": None, **sampling}
    )
    return Counter((text[1], text[2]) for text in texts)


def exact_pairs(directory) -> torch.Tensor:
    """Return the probability [v, v] of each pair of second and third tokens, by transformers."""
    model = reference(directory)

    def next_tokens(texts: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode():
            logits = model(torch.tensor(texts))[:, -1]
        return (logits.double() / TEMPERATURE).softmax(-1)

    every = range(VOCABULARY)
    first, joint = next_tokens([PROMPT])[0], torch.zeros(VOCABULARY, VOCABULARY).double()
    for token in every:
        if first[token] < 1e-7:
            continue
        second = next_tokens([[*PROMPT, token]])[0]
        third = next_tokens([[*PROMPT, token, other] for other in every])
        joint += first[token] * second[:, None] * third
    return joint


def chi_square(counts: Counter, joint: torch.Tensor) -> float:
    """Return (statistic - degrees of freedom) / standard deviation, about normal if they agree.

    Pairs that are expected less than 5 times are one cell.
    """
    expected = joint.flatten() * SAMPLES
    seen = torch.zeros_like(expected)
    for (second, third), count in counts.items():
        seen[second * VOCABULARY + third] = count
    often = expected >= 5
    cells = torch.cat((expected[often], expected[~often].sum()[None]))
    there = torch.cat((seen[often], seen[~often].sum()[None]))
    statistic, degrees = float(((there - cells) ** 2 / cells).sum()), len(cells) - 1
    assert degrees > 20
    return (statistic - degrees) / (2 * degrees) ** 0.5


@pytest.mark.parametrize(
    ("options", "more"),
    [
        (EngineOptions("self_speculative", (2,)), {}),
        (EngineOptions("self_speculative", (2,)), {"draft_sample_method": "probabilistic"}),
        (EngineOptions("sorted_speculative", (1, 3), (0.3, 0.1), num_draft_tokens=3), {}),
    ],
    ids=str,
)
def test_samples_have_the_target_s_distribution(model, options, more):
    from megatron_sorted.serving.vllm.options import engine_arguments

    speculation = {**engine_arguments(model, options)["speculative_config"], **more}
    with engine(model, options, speculative_config=speculation) as (llm, counts):
        assert abs(chi_square(pairs(llm), exact_pairs(model))) < 4
        assert 0 < counts.accepted < counts.drafted


def test_greedy_requests_beside_sampled_ones(model):
    from vllm import SamplingParams

    options, requests = EngineOptions("self_speculative", (2,)), [{"prompt_token_ids": PROMPT}] * 16
    parameters = [
        SamplingParams(temperature=row % 2, max_tokens=24, ignore_eos=True) for row in range(16)
    ]
    with engine(model) as (llm, _):
        [plain] = generate(llm, [PROMPT], 24)
    with engine(model, options) as (llm, counts):
        outputs = llm.generate(requests, parameters, use_tqdm=False)
    assert all(list(one.outputs[0].token_ids) == plain for one in outputs[::2])
    assert counts.accepted


def test_the_engine_s_own_fault_without_the_plug_in(model, tmp_path, monkeypatch):
    """vllm-project/vllm#55005, with an extracted model as vLLM's own draft: the text is wrong.

    The plug-in's repair makes it right. When this test fails, vLLM has mended it, and
    ``serving/vllm/expansion.py`` may go.
    """
    from vllm.v1.sample import rejection_sampler

    from megatron_sorted.serving.vllm import expansion

    monkeypatch.setattr(rejection_sampler, expansion.NAME, expansion.GIVEN)
    assert expansion.is_faulty()
    draft = extract_by_hand(model, tmp_path / "draft", 2, ())
    speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 4}
    joint = exact_pairs(model)
    with engine(model, speculative_config=speculation) as (llm, _):
        assert chi_square(pairs(llm), joint) > 20
        assert expansion.repair() and not expansion.is_faulty()
        assert abs(chi_square(pairs(llm), joint)) < 4
