"""Passes in parts, lazy, on ragged batches and in trees equal transformers on the whole text."""

import pytest
import torch

from megatron_sorted.decoding.cache.state import DecodingState
from tests.support.decoding import DEPTHS, last_logits, nested, plain_network, prompts
from tests.support.exit_parts import KINDS
from tests.support.model_directories import FAMILIES

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def make_state(network, texts, stops=DEPTHS, num_new=40) -> DecodingState:
    state = DecodingState(network, len(texts), max(map(len, texts)) + num_new, stops)
    longest = max(map(len, texts))
    state.append(
        torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts]),
        [len(text) for text in texts],
    )
    return state


def next_logits(state: DecodingState, depth: int) -> torch.Tensor:
    state.read(depth)
    return state.logits(depth, state.last_slots())[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_exit_of_ragged_rows_that_exit_early_and_are_filled_later(family, kind, tmp_path):
    case, network = nested(
        tmp_path,
        family,
        kind,
        norms=family != "llama",
        heads=family == "mistral",
        tied=family == "qwen2",
    )
    texts = prompts((30, 3, 17), 100)
    state = make_state(network, texts)
    # deeper layers often lack several tokens
    for step, depth in enumerate((1, 4, 1, 1, 3, 1, 4, 3)):
        got = next_logits(state, depth)
        for row, text in enumerate(texts):
            torch.testing.assert_close(got[row], last_logits(case, depth, text), **CLOSE)
        more = torch.tensor(prompts((1, 1, 1), 100, seed=step))
        state.append(more)
        texts = [[*text, *new] for text, new in zip(texts, more.tolist(), strict=True)]


def test_rows_are_cropped_and_continue_alone():
    case, network = plain_network("mistral")
    texts = prompts((9, 25), 100)
    state = make_state(network, texts, (2, 4))
    next_logits(state, 2)
    state.crop([5, 24])
    state.append(torch.tensor([[7, 8], [9, 0]]), [2, 1])
    texts = [[*texts[0][:5], 7, 8], [*texts[1][:24], 9]]
    got = next_logits(state, 4)
    for row, text in enumerate(texts):
        torch.testing.assert_close(got[row], last_logits(case, 4, text), **CLOSE)
    state.select_rows([1])
    state.append(torch.tensor([[3]]))
    torch.testing.assert_close(
        next_logits(state, 4)[0], last_logits(case, 4, [*texts[1], 3]), **CLOSE
    )


@pytest.mark.parametrize("rows", [[1, 2], [0, 2], [2]])
@pytest.mark.parametrize("kind", ["block", "adapter and block"])
def test_rows_that_end_leave_the_memory_of_the_others_in_place(rows, kind, tmp_path):
    case, network = nested(tmp_path, "mistral", kind)
    texts = prompts((9, 25, 14), 100)
    state = make_state(network, texts)
    next_logits(state, 1)
    addresses = [tensor.data_ptr() for tensor in state.memory.tensors()]
    state.select_rows(rows)
    assert [tensor.data_ptr() for tensor in state.memory.tensors()] == addresses, (
        "no second cache is allocated"
    )
    assert all(tensor.size(0) == len(rows) for tensor in state.memory.tensors())
    state.append(torch.tensor([[3]] * len(rows)))
    for depth in (3, 4):
        got = next_logits(state, depth)
        for place, row in enumerate(rows):
            torch.testing.assert_close(
                got[place], last_logits(case, depth, [*texts[row], 3]), **CLOSE
            )


def test_a_long_prompt_is_read_in_parts(monkeypatch):
    monkeypatch.setattr("megatron_sorted.decoding.cache.state.PART", 7)
    case, network = plain_network("mistral")
    texts = prompts((40, 40, 23), 100)
    for rows in ([0, 1], [0, 2]):
        got = next_logits(make_state(network, [texts[row] for row in rows]), 4)
        for place, row in enumerate(rows):
            torch.testing.assert_close(got[place], last_logits(case, 4, texts[row]), **CLOSE)


@pytest.mark.parametrize("family", ["llama3", "mistral"])
@pytest.mark.parametrize("lengths", [(6,), (11, 21, 4)])
def test_each_node_of_a_tree_attends_to_its_own_path(family, lengths):
    case, network = plain_network(family)
    texts = prompts(lengths, 100)
    state, rows = make_state(network, texts, (1, 2, 4)), len(texts)
    next_logits(state, 1)
    state.begin_tree()
    nodes = [[(5, -1), (6, -1), (7, 0), (8, 0), (9, 2), (10, 1)]] * rows
    for first, end, depth in ((0, 2, 1), (2, 4, 2), (4, 6, 4)):
        state.grow(*torch.tensor([row[first:end] for row in nodes]).unbind(-1))
        state.read(depth)
    slots = torch.tensor(lengths)[:, None] + torch.arange(6)
    got = state.logits(4, slots)
    for row, text in enumerate(texts):
        for node in range(6):
            torch.testing.assert_close(
                got[row, node], last_logits(case, 4, [*text, *path(nodes[row], node)]), **CLOSE
            )


def test_a_tree_is_pruned_and_its_best_path_becomes_text():
    case, network = plain_network("mistral")
    texts = prompts((13, 22), 100)
    state = make_state(network, texts, (1, 3, 4))
    next_logits(state, 1)
    state.begin_tree()
    state.grow(torch.tensor([[5, 6, 7]] * 2), torch.tensor([[-1, -1, -1]] * 2))
    state.read(1)
    state.grow(torch.tensor([[8, 9], [10, 11]]), torch.tensor([[1, 2], [0, 1]]))
    state.read(1)
    state.keep_nodes([[1, 2, 3, 4], [0, 1, 3, 4]])
    assert state.tree.parents_bt.tolist() == [[-1, -1, 0, 1], [-1, -1, 0, 1]]
    state.grow(torch.tensor([[12], [13]]), torch.tensor([[3], [2]]))
    state.read(4)
    state.accept([[1, 3, 4], [0, 2]])
    texts = [[*texts[0], 7, 9, 12], [*texts[1], 5, 10]]
    for row, text in enumerate(texts):
        assert state.tokens_bc[row, : state.lengths[row]].tolist() == text
    for depth in (3, 1, 4):
        state.append(torch.tensor([[3], [4]]))
        texts = [[*texts[0], 3], [*texts[1], 4]]
        got = next_logits(state, depth)
        for row, text in enumerate(texts):
            torch.testing.assert_close(got[row], last_logits(case, depth, text), **CLOSE)


def path(nodes: list[tuple[int, int]], node: int) -> list[int]:
    token, parent = nodes[node]
    return [token] if parent < 0 else [*path(nodes, parent), token]
