"""Passes with positions on the device give the results of others, run anew and replayed."""

import itertools

import pytest
import torch

from megatron_sorted.decoding.cache.idle import MAX_IDLE
from megatron_sorted.decoding.cache.passes import Passes
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import generate, stream
from megatron_sorted.decoding.network import load_network
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
from tests.support.decoding import DEPTHS, last_logits, prompts
from tests.support.exit_parts import save_nested
from tests.support.model_directories import FAMILIES
from tests.support.tape import Tape

STRATEGIES = [
    Full(),
    Fixed(1),
    EarlyExit((1, 3), (0.02, 0.02)),
    SelfSpeculative(1, 4),
    SortedSpeculative((1, 3), (0.02, 0.02), 5),
    TreeSpeculative((1, 3), (0.02,), 3, 2, 6),
]


def loaded(tmp_path, family="mistral", kind="block", record=True):
    """Return the reference of a model, its ordinary network, and one with positions on the device.

    The passes of the last are recorded if ``record``.
    """
    case = save_nested(tmp_path, family, kind)
    network = load_network(tmp_path, graphs=True)
    if record:
        network.make_recorder = Tape
    return case, load_network(tmp_path), network


PAIRS = pytest.mark.long(reason="each pair of family, parts and replay stands in another row")


@pytest.mark.parametrize(
    ("family", "kind", "record"),
    [
        pytest.param(
            family,
            kind,
            record,
            id=f"{family}-{kind}-{'replayed' if record else 'anew'}",
            marks=() if (number + (kind == "block") + record) % 2 else PAIRS,
        )
        for number, family in enumerate(FAMILIES)
        for kind in ("block", "adapter and mlp")
        for record in (False, True)
    ],
)
@torch.inference_mode()
def test_every_exit_of_every_family(family, kind, record, tmp_path):
    case, _, network = loaded(tmp_path, family, kind, record)
    for lengths in ((9,), (30, 3)):
        texts = prompts(lengths, 100)
        state = DecodingState(network, len(texts), 80, DEPTHS)
        for row, text in enumerate(texts):
            state.append(
                torch.tensor([text] * len(texts)),
                [len(text) if place == row else 0 for place in range(len(texts))],
            )
        for step, depth in enumerate((1, 4, 1, 1, 3, 1, 4, 1, 1, 3, 1, 4)):
            state.read(depth)
            got = state.logits(depth, state.last_slots())[:, 0]
            for row, text in enumerate(texts):
                torch.testing.assert_close(
                    got[row], last_logits(case, depth, text), rtol=1e-4, atol=1e-4
                )
            more = torch.tensor(prompts([1] * len(texts), 100, seed=step))
            state.append(more)
            texts = [[*text, *new] for text, new in zip(texts, more.tolist(), strict=True)]
        assert (state.memory.passes.num_replays > 0) == record


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_every_strategy_generates_the_same_text_replayed(strategy, tmp_path):
    _, plain, network = loaded(tmp_path)
    texts = prompts((11, 3, 100), 100)
    for sampling, rows in itertools.product(
        (SamplingParameters(), SamplingParameters(0.8, repetition_penalty=1.2)),
        ([0], [2], [0, 1, 2]),
    ):
        chosen = [texts[row] for row in rows]
        wanted = [text.tokens for text in generate(plain, chosen, strategy, sampling, Limits(40))]
        assert [
            text.tokens for text in generate(network, chosen, strategy, sampling, Limits(40))
        ] == wanted
    assert sum(memory.passes.num_replays for memory in network.idle) > 20


def test_fewer_rows_use_another_cache_and_all_caches_are_released(tmp_path):
    _, plain, network = loaded(tmp_path)
    texts, strategy = prompts((11, 3, 24), 100), SelfSpeculative(1, 3)
    ends = frozenset({generate(plain, [texts[0]], strategy, limits=Limits(10))[0].tokens[-1]})
    wanted = [text.tokens for text in generate(plain, texts, strategy, limits=Limits(30, ends))]
    assert [
        text.tokens for text in generate(network, texts, strategy, limits=Limits(30, ends))
    ] == wanted
    assert len({memory.num_rows for memory in network.idle}) > 1


def test_caches_are_reused_but_never_shared(tmp_path):
    _, plain, network = loaded(tmp_path)
    one, other = prompts((11, 5), 100)
    [wanted], [also] = (
        generate(plain, [one], limits=Limits(30)),
        generate(plain, [other], limits=Limits(20)),
    )
    running = stream(network, [one], limits=Limits(30))
    tokens = [next(running).tokens[0] for _ in range(7)]
    assert generate(network, [other], limits=Limits(20))[0].tokens == also.tokens
    [memory] = network.idle
    recorded = len(memory.passes._recorded)
    assert recorded > 0
    tokens += [added.tokens[0] for added in running]
    assert tokens == wanted.tokens
    del running
    assert len(network.idle) == 2
    for tensor in memory.tensors():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))  # as a text that failed may leave
    network.idle = [memory]
    assert generate(network, [other], limits=Limits(20))[0].tokens == also.tokens
    assert network.idle == [memory] and len(memory.passes._recorded) == recorded, (
        "later texts use recorded passes"
    )
    for rows in range(1, MAX_IDLE + 3):
        generate(network, [other] * rows, limits=Limits(2))
    assert len(network.idle) == MAX_IDLE and memory not in network.idle


def test_recording_is_tried_once_on_a_device_that_cannot():
    tried, done = [], []

    def record(work):
        tried.append(work)
        raise RuntimeError("no room")

    passes = Passes(record)
    passes("a", lambda: done.append("a"))
    with pytest.warns(RuntimeWarning, match=r"not recorded: no room\. .* graphs=False"):
        passes("a", lambda: done.append("a"))
    passes("a", lambda: done.append("a"))
    assert (len(tried), done, passes.num_replays) == (1, ["a"] * 3, 0)


def test_the_number_of_recorded_passes_is_limited(monkeypatch):
    monkeypatch.setattr("megatron_sorted.decoding.cache.passes.MAX_RECORDED", 2)
    passes, tensor = Passes(Tape()), torch.zeros(1)
    for name in [*"abc", *"abc", *"abc"]:
        passes(name, lambda: tensor.add_(0))
    assert passes.num_replays == 4, (
        "a and b are recorded and replayed at their second and third time"
    )
