"""Passes of the compiled library: equal bits in every form, and transformers' numbers in fp32."""

import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, strategies
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.network import load_network
from tests.support.decoding import DEPTHS, prompts
from tests.support.exit_parts import KINDS as PARTS
from tests.support.exit_parts import save_nested
from tests.support.hugging_face import make_model
from tests.support.model_directories import FAMILIES
from tests.support.native_libraries import targets
from tests.support.native_networks import (
    DTYPES,
    VOCABULARY,
    append_ragged,
    load_native,
    path_to,
    read_one_by_one,
    slots_of,
)


@strategies.composite
def shapes(draw) -> tuple[str, dict]:
    """Return a family and config of a model with unusual sizes."""
    family = draw(strategies.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3"]))
    groups = draw(strategies.integers(1, 3))
    heads = groups * draw(strategies.sampled_from([1, 2, 3, 4, 10]))  # 8 share a tile at most
    changes = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": draw(strategies.sampled_from([4, 8, 20, 80])),
        "hidden_size": heads * draw(strategies.sampled_from([4, 11, 43])),
        "intermediate_size": draw(strategies.sampled_from([1, 5, 48, 172])),
        "tie_word_embeddings": draw(strategies.booleans()),
    }
    if family == "Qwen2":  # the size of its heads is no setting
        changes["hidden_size"] = heads * changes["head_dim"]
    if family == "Mistral":
        changes["sliding_window"] = draw(strategies.sampled_from([1, 3, 20, None]))
    return family, changes


@strategies.composite
def cases(draw) -> dict:
    """Return texts, the passes in which they are read, and a tree behind each."""
    rows = draw(strategies.integers(1, 3))
    passes = [
        ([draw(strategies.integers(0, 16)) for _ in range(rows)], draw(strategies.booleans()))
        for _ in range(draw(strategies.integers(1, 3)))
    ]
    passes[0] = ([max(1, count) for count in passes[0][0]], passes[0][1])
    size = draw(strategies.integers(1, 7))
    parents = [
        [draw(strategies.integers(-1, node - 1)) for node in range(size)] for _ in range(rows)
    ]
    return {
        "passes": passes,
        "parents": parents,
        "first_nodes": draw(strategies.integers(0, size)),
        "threads": draw(strategies.integers(1, 2)),
        "target": draw(strategies.sampled_from(targets())),
    }


@pytest.fixture
def threads():
    """Return a function that sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", DTYPES)
@hypothesis.settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    database=None,
    suppress_health_check=list(HealthCheck),
)
@hypothesis.given(shapes(), cases())
def test_passes_of_any_form_equal_passes_of_one_token_bit_for_bit(kind, threads, shape, case):
    family, changes = shape
    with tempfile.TemporaryDirectory() as directory:
        make_model(family, **changes).save_pretrained(directory)
        network = load_native(Path(directory), kind, case["target"], (1, 2))
    rows, stops = len(case["parents"]), (1, 2)
    totals = [sum(counts[row] for counts, _ in case["passes"]) for row in range(rows)]
    texts = prompts(totals, VOCABULARY)
    threads(1)
    expected = [read_one_by_one(network, text, stops) for text in texts]
    threads(case["threads"])
    state, read = DecodingState(network, rows, max(totals) + 7, stops), [0] * rows
    for counts, is_deep in case["passes"]:
        append_ragged(
            state,
            [
                text[start : start + count]
                for text, start, count in zip(texts, read, counts, strict=True)
            ],
        )
        read = [start + count for start, count in zip(read, counts, strict=True)]
        state.read(2 if is_deep else 1)  # deeper layers may lack tokens of several passes
    state.read(2)
    for row, total in enumerate(totals):
        for stop in stops:
            got = slots_of(state, row, stop, range(total))
            for slot in range(total):
                assert got[slot].equals(expected[row][stop][slot]), (row, stop, slot)

    # a tree behind the texts, read in two passes
    parents = case["parents"]
    nodes = prompts([len(row) for row in parents], VOCABULARY, seed=1)
    state.begin_tree()
    for node in range(len(parents[0])):
        state.grow(*(torch.tensor([[row[node]] for row in rows]) for rows in (nodes, parents)))
        if node + 1 == case["first_nodes"]:
            state.read(2)
    state.read(2)
    for row, text in enumerate(texts):
        for node in range(len(parents[row])):
            path = path_to(parents[row], node)
            plain = read_one_by_one(network, [*text, *(nodes[row][i] for i in path)], stops)
            for stop in stops:
                got = slots_of(state, row, stop, [totals[row] + node])[0]
                assert got.equals(plain[stop][-1]), (row, stop, node)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("target", targets())
def test_a_prompt_of_70_tokens_equals_70_passes_and_passes_of_n(
    target, family, kind, tmp_path, threads
):
    save_nested(tmp_path, family, "adapter and block", norms=True, heads=True)
    network, text = load_native(tmp_path, kind, target), prompts((70,), 100)[0]
    threads(1)
    expected = read_one_by_one(network, text, DEPTHS)
    for n, number in ((70, 1), (70, 2), *((n, n % 2 + 1) for n in (2, 5, 7, 8, 13, 16))):
        threads(number)
        state = DecodingState(network, 1, 70, DEPTHS)
        for start in range(0, 70, n):
            state.append(torch.tensor([text[start : start + n]]))
            for depth in DEPTHS:
                state.read(depth)
        for depth in DEPTHS:
            got = slots_of(state, 0, depth, range(70))
            same = [one.equals(other) for one, other in zip(got, expected[depth], strict=True)]
            assert all(same), (n, depth, same.index(False))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_equal_transformers(family, parts, tmp_path):
    case = save_nested(
        tmp_path,
        family,
        parts,
        norms=family != "llama",
        heads=family == "mistral",
        tied=family == "qwen2",
    )
    text = prompts((45,), 100)[0]
    for target in targets():
        network = load_native(tmp_path, "float32", target)
        state = DecodingState(network, 1, len(text), DEPTHS)
        state.append(torch.tensor([text]))
        for depth in DEPTHS:
            state.read(depth)
            got = state.logits(depth, torch.arange(45)[None])[0]
            expected = case.logits(depth, torch.tensor([text]))[0]
            error = (got - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, (target, depth)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_quantised_logits_are_near_those_of_float32(kind, tmp_path):
    save_nested(tmp_path, "qwen3", "block")
    text, got = torch.tensor(prompts((30,), 100)), {}
    for name in ("float32", kind):
        state = DecodingState(load_native(tmp_path, name), 1, 30, DEPTHS)
        state.append(text)
        state.read(4)
        got[name] = state.logits(4, torch.arange(30)[None])[0].flatten()
    both = torch.stack([got["float32"], got[kind]])
    assert torch.corrcoef(both)[0, 1] > 0.99
    assert not torch.equal(*both)


class Products(TorchDispatchMode):
    """Records the operations of torch that multiply matrices or attend."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "dot", "mv", "einsum")

    def __init__(self):
        super().__init__()
        self.got = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0].strip("_")
        if name in self.NAMES or "attention" in name or "mkldnn" in name or "int8" in name:
            self.got.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("native", ["on", "off"])
def test_native_decoding_calls_no_product_of_torch(native, tmp_path):
    save_nested(tmp_path, "mistral", "adapter and mlp")
    network = (
        load_native(tmp_path, "float32") if native == "on" else load_network(tmp_path, native="off")
    )
    state = DecodingState(network, 2, 60, DEPTHS)
    with torch.no_grad(), Products() as products:
        append_ragged(state, prompts((30, 9), 100))
        for depth in DEPTHS:
            state.read(depth)
            state.logits(depth, state.last_slots(2))
        state.begin_tree()
        state.grow(torch.tensor([[5, 6]] * 2), torch.tensor([[-1, 0]] * 2))
        state.read(4)
        state.accept([[0, 1], [0]])
    assert bool(products.got) == (native == "off"), set(products.got)


@pytest.mark.parametrize("kind", DTYPES)
def test_a_hidden_state_that_is_not_a_number_gives_logits_that_are_none(kind, tmp_path):
    save_nested(tmp_path, "llama3", "block")
    network = load_native(tmp_path, kind)
    state = DecodingState(network, 2, 40, DEPTHS)
    append_ragged(state, prompts((20, 20), 100))
    state.read(1)
    expected = state.logits(4, state.last_slots()).clone() * 0
    state.segments[1].hidden_bch[0, 3] = float("nan")
    state.read(4)
    got = state.logits(4, torch.arange(20)[None].repeat(2, 1))
    assert expected.shape == (2, 1, 100)
    assert torch.isfinite(got[0, :3]).all() and torch.isnan(got[0, 3:]).all()
    assert torch.isfinite(got[1]).all(), "another text is not touched"
