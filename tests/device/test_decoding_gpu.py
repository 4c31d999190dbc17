"""Decoding on an NVIDIA GPU, with and without graphs."""

import warnings

import pytest
import torch

from megatron_sorted.decoding.generate import generate, make_step
from megatron_sorted.decoding.network import load_network
from megatron_sorted.decoding.speculation.steps import run_step
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
from tests.support.decoding import prompts, started
from tests.support.exit_parts import save_nested

pytestmark = pytest.mark.gpu
STRATEGIES = [
    Full(),
    Fixed(1),
    EarlyExit((1, 3), (0.02, 0.02)),
    SelfSpeculative(1, 4),
    SortedSpeculative((1, 3), (0.02, 0.02), 5),
    TreeSpeculative((1, 3), (0.02,), 3, 2, 6),
]
SPECULATIVE = STRATEGIES[3:]


def texts_of(network, strategy, rows, sampling=None):
    texts = prompts((11, 100, 3), 100)
    return [
        text.tokens
        for text in generate(network, [texts[row] for row in rows], strategy, sampling, Limits(60))
    ]


@pytest.fixture(params=["mistral", "qwen3"])
def networks(request, tmp_path):
    save_nested(tmp_path, request.param, "block")
    return load_network(tmp_path), *(
        load_network(tmp_path, device="cuda", graphs=graphs) for graphs in (False, True)
    )


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_every_strategy_gives_the_same_tokens_on_a_gpu_as_on_a_cpu(strategy, networks):
    cpu, eager, graphs = networks
    for sampling in (None, SamplingParameters(0.8, repetition_penalty=1.2)):
        for rows in ([0], [1], [0, 1, 2]):
            wanted = texts_of(cpu, strategy, rows, sampling)
            assert texts_of(eager, strategy, rows, sampling) == wanted
            assert texts_of(graphs, strategy, rows, sampling) == wanted
            if strategy in SPECULATIVE:
                assert wanted == texts_of(cpu, Full(), rows, sampling)
    assert not eager.idle and sum(memory.passes.num_replays for memory in graphs.idle) > 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype, tmp_path):
    save_nested(tmp_path, "qwen3", "block")
    network = load_network(tmp_path, dtype=dtype, device="cuda")
    assert network.graphs, "graphs are the default on a GPU"
    for strategy in STRATEGIES:
        [tokens] = texts_of(network, strategy, [0])
        assert len(tokens) == 60
    assert sum(memory.passes.num_replays for memory in network.idle) > 50


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    "sampling",
    [SamplingParameters(), SamplingParameters(0.9, top_p=0.9, repetition_penalty=1.2)],
    ids=["greedy", "sampled"],
)
@torch.inference_mode()
def test_a_draft_does_not_wait_for_the_gpu_and_a_step_once(graphs, sampling, tmp_path):
    save_nested(tmp_path, "mistral", "block")
    network, strategy = load_network(tmp_path, device="cuda", graphs=graphs), SelfSpeculative(1, 4)
    batch = started(network, prompts((9,), 100), strategy, sampling, 200)
    step, state = make_step(strategy, batch), batch.state
    for _ in range(12):  # every width that drafting and verifying can have comes twice
        step.step()
    lengths = list(state.lengths)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("error")
            run_step(step._draft(state))
            state.crop(lengths)
            torch.cuda.set_sync_debug_mode("warn")
            step.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in caught if "called a synchronizing" in str(one.message)]) == 1
