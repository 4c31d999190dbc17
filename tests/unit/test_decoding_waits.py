"""The number of waits of a step for the device: one for its result, one for each decision."""

import pytest
import torch

from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.conversion.hugging_face.nested_exits import NestedExit
from megatron_sorted.decoding import generate as generate_module
from megatron_sorted.decoding import sampling as sampling_module
from megatron_sorted.decoding.cache import transfer
from megatron_sorted.decoding.generate import make_step
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.strategies import (
    EarlyExit,
    Fixed,
    Full,
    SamplingParameters,
    SelfSpeculative,
    SortedSpeculative,
    TreeSpeculative,
)
from tests.support.decoding import prompts, started
from tests.support.host_waits import HostWaits, MarkedPlatform
from tests.support.model_directories import family_model

NEVER, ALWAYS = 1.0, 0.0
STRATEGIES = [
    (Full(), 1),
    (Fixed(2), 1),
    (SelfSpeculative(2, 6), 1),
    # one wait for the confidence of each exit, one for the token of the last
    (EarlyExit((1, 3), (NEVER, NEVER)), 3),
    (EarlyExit((1, 3), (ALWAYS, NEVER)), 2),
    # one for each exit that is evaluated for a drafted token, one for the verification
    (SortedSpeculative((1, 3), (ALWAYS, NEVER), 6), 7),
    (SortedSpeculative((1, 3), (NEVER, ALWAYS), 6), 13),
    (SortedSpeculative((1, 3), (NEVER, NEVER), 6), 3),
    # one for each level and exit but the last; the candidates; the tree; the result
    (TreeSpeculative((2,), (), 4, 2, 6), 3),
    (TreeSpeculative((1, 3), (NEVER,), 4, 2, 6), 7),
]
SAMPLINGS = [
    SamplingParameters(),
    SamplingParameters(0.9, top_k=20, top_p=0.9, repetition_penalty=1.2),
]


@pytest.fixture
def stand_in(monkeypatch):
    """Return a model on a simulated device, and the recorder of waits."""
    model = family_model("mistral").requires_grad_(False)
    waits = HostWaits()
    waits.mark(*model.parameters(), *model.buffers())
    to_device = lambda tensor, device: MarkedPlatform(waits).to_device(tensor)  # noqa: E731
    for module in (transfer, sampling_module, generate_module):
        monkeypatch.setattr(module, "to_device", to_device)
    return model, waits


def check(model, waits, strategy, sampling, lengths, measure, graphs):
    with waits, torch.inference_mode():
        network = Network(
            model,
            {depth: NestedExit(model.model.norm, model.lm_head) for depth in (1, 2, 3, 4)},
            packed=False,
            graphs=graphs,
        )
        if hasattr(strategy, "measure"):
            strategy = type(strategy)(**{**vars(strategy), "measure": measure})
        batch = started(network, prompts(lengths, 100), strategy, sampling, 60)
        step, by_step = make_step(strategy, batch), []
        for _ in range(3):
            waits.ours.clear()
            step.step()
            by_step.append([*waits.ours])
    return by_step


@pytest.mark.parametrize("graphs", [False, True], ids=["by the host", "by the device"])
@pytest.mark.parametrize("lengths", [(9,), (9, 4)], ids=["one", "ragged"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("strategy", "times"),
    STRATEGIES,
    ids=[f"{strategy.name}-{times}" for strategy, times in STRATEGIES],
)
def test_a_step_waits_only_as_often_as_needed(strategy, times, sampling, lengths, graphs, stand_in):
    for waited in check(*stand_in, strategy, sampling, lengths, "probability", graphs):
        assert len(waited) == times, waited


@pytest.mark.parametrize("measure", CONFIDENCE)
def test_measures_do_not_wait(measure, stand_in):
    for waited in check(
        *stand_in, EarlyExit((1, 3), (NEVER, NEVER)), SamplingParameters(), (9,), measure, False
    ):
        assert len(waited) == 3, waited


def test_rows_are_removed_without_a_wait(stand_in):
    model, waits = stand_in
    with waits, torch.inference_mode():
        network = Network(
            model,
            {depth: NestedExit(model.model.norm, model.lm_head) for depth in (2, 4)},
            packed=False,
        )
        batch = started(
            network,
            prompts((9, 4, 6), 100),
            SelfSpeculative(2, 3),
            SamplingParameters(0.9, repetition_penalty=1.2),
            20,
        )
        step = make_step(SelfSpeculative(2, 3), batch)
        step.step()
        waits.ours.clear()
        batch.select_rows([0, 2])
        step.step()
    assert len(waits.ours) == 1, waits.ours
