"""torch's steps are joined where that changes no bit, and only there."""

import pytest
import torch

from megatron_sorted.decoding.batching.joining import join_steps
from megatron_sorted.decoding.cache.joined import ForwardPass, run_joined
from megatron_sorted.decoding.cache.matrix import Matrix
from megatron_sorted.decoding.cache.memory import STEP_ROWS
from megatron_sorted.decoding.cache.state import DecodingState
from tests.support.decoding import has_native, nested, plain_network, prompts


@torch.inference_mode()
def test_steps_beside_others_have_the_bits_of_steps_alone_and_few_products(tmp_path, monkeypatch):
    case, network = nested(tmp_path, "qwen3", "block", native="off")
    assert join_steps(network)
    texts = prompts((30, 4, 17, 9, 50, 21, 8, 12, 3, 40, 33), 100)

    def start() -> list[DecodingState]:
        states = []
        for text in texts:
            state = DecodingState(network, 1, 80, network.depths)
            state.append(torch.tensor([text]))
            for depth in network.depths:
                state.read(depth)
            states.append(state)
        return states

    def wanted(states: list[DecodingState], depths: list[int]) -> list[ForwardPass]:
        passes = []
        for number, (state, depth) in enumerate(zip(states, depths, strict=True)):
            state.append(torch.tensor([[5 + number] * (1 + number % 3)]))
            passes.append(ForwardPass(state, depth, state.last_slots(1 + number % 2)))
        return passes

    depths = [network.depths[number % len(network.depths)] for number in range(len(texts))]
    alone = [run_joined([one], [64]).logits[0] for one in wanted(start(), depths)]
    rows = []
    multiply = Matrix.__call__
    monkeypatch.setattr(
        Matrix, "__call__", lambda *given: rows.append(given[1].size(0)) or multiply(*given)
    )
    passes = wanted(start(), depths)
    rows.clear()
    together = run_joined(passes, [64] * len(texts)).logits
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    for text, depth, logits, number in zip(texts, depths, alone, range(99), strict=False):
        whole = torch.tensor([[*text, *[5 + number] * (1 + number % 3)]])
        torch.testing.assert_close(logits[0], case.logits(depth, whole)[0, -1 - number % 2 :])
    assert set(rows) <= {STEP_ROWS, 2 * STEP_ROWS, 3 * STEP_ROWS}


def test_products_whose_rows_depend_on_each_other_are_not_joined(monkeypatch):
    _, network = plain_network("llama", kind="torch")
    try:
        assert join_steps(network)
        multiply = Matrix.__call__

        def uneven(self, x, rows=None):
            y = multiply(self, x, rows)
            return y if rows else y + 1e-7 * x.sum(0).mean()

        monkeypatch.setattr(Matrix, "__call__", uneven)
        assert not join_steps(network) and not network.joins_steps
    finally:
        network.joins_steps = False


@pytest.mark.parametrize("kind", ["adapter and block", "native"])
def test_what_cannot_be_joined_is_left_as_it_is(kind, tmp_path):
    native = "auto" if kind == "native" else "off"
    if native == "auto" and not has_native():
        pytest.skip("no C++ compiler builds the library")
    _, network = nested(tmp_path, "llama", "block" if kind == "native" else kind, native=native)
    assert not join_steps(network) and not network.joins_steps
