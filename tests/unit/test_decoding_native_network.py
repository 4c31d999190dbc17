"""A model packed for the compiled library: what it keeps, what it frees, what stays usable."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sorted.conversion.hugging_face.nested_exits import ExitNorm, NestedExit
from megatron_sorted.decoding.cache.matrix import Matrix
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.native.compiler import NativeError
from megatron_sorted.decoding.network import Network, load_network
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.exported.load import load_with_exits
from tests.support.decoding import needs_native, nested, plain_network, prompts
from tests.support.exit_parts import save_nested
from tests.support.model_directories import family_model

pytestmark = needs_native
TEXTS = prompts((5, 9, 7), 100)


def exits_of(model, *depths) -> dict[int, NestedExit]:
    return {depth: NestedExit(model.model.norm, model.lm_head) for depth in (*depths, 4)}


def fresh_logits(network, texts=TEXTS, depth=4) -> torch.Tensor:
    """Return the logits after each text, read alone."""
    rows = []
    for text in texts:
        state = DecodingState(network, 1, len(text), (depth,))
        state.append(torch.tensor([text]))
        state.read(depth)
        rows.append(state.logits(depth, state.last_slots())[0, 0])
    return torch.stack(rows)


def with_nan(model):
    model.lm_head.weight[-1, -1] = float("nan")
    return {4: NestedExit(model.model.norm, model.lm_head)}


def with_infinite_norm(model):
    model.model.norm.weight[3] = float("inf")
    return {4: NestedExit(model.model.norm, model.lm_head)}


def with_gelu(model):
    model.model.layers[-1].mlp.act_fn = nn.GELU()
    return {4: NestedExit(model.model.norm, model.lm_head)}


def with_dropout(model):
    last = NestedExit(model.model.norm, model.lm_head)
    norm = ExitNorm([nn.Dropout(0.5).eval()], model.model.norm)
    return {1: NestedExit(norm, model.lm_head), 4: last}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_nan, "not finite"),
        (with_infinite_norm, "not finite"),
        (with_gelu, "activation is GELU"),
        (with_dropout, "an exit has a Dropout"),
    ],
)
def test_a_model_that_cannot_be_packed_is_unchanged(change, reason):
    model = family_model("llama").requires_grad_(False)
    exits = change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NativeError, match=reason):
        Network(model, exits, native="int8")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    [text] = generate(Network(model, exits), TEXTS[:1], limits=Limits(3))
    assert len(text.tokens) == 3


def test_torch_runs_what_the_library_does_not_know(tmp_path, capsys, monkeypatch):
    save_nested(tmp_path, "llama", "block", dtype=torch.bfloat16)
    wanted = load_network(tmp_path, native="off")
    monkeypatch.setattr("megatron_sorted.decoding.native.choice._reported", set())
    monkeypatch.setattr("megatron_sorted.decoding.native.parts.ACTIVATIONS", ())
    network, _ = load_network(tmp_path), load_network(tmp_path)
    assert capsys.readouterr().err.count("which the library does not know") == 1
    assert not network.is_native and network.dtype == network.embedding.dtype == torch.float32
    torch.testing.assert_close(fresh_logits(network), fresh_logits(wanted), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_are_freed_and_counted(kind, tied):
    model = family_model("llama", tied=tied).requires_grad_(False)
    other = copy.deepcopy(model)
    shapes = [
        [sum(part.out_features for part in parts), parts[0].in_features]
        for layer in model.model.layers
        for attention, mlp in [(layer.self_attn, layer.mlp)]
        for parts in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        )
    ]
    shapes.append([model.lm_head.out_features, model.lm_head.in_features])
    network = Network(model, exits_of(model, 1, 2), native=kind)
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[kind]
    per = {"float32": 1, "bfloat16": 2, "int8": 64}[kind]
    expected = 0
    for outputs, inputs in shapes:  # whole blocks of 64 outputs, whole groups of inputs
        outputs, inputs = -(-outputs // 64) * 64, -(-inputs // per) * per
        expected += outputs * inputs * size + (outputs * inputs // 64 * 4) * (kind == "int8")
    norms = (2 * 4 + 1) * network.hidden_size * 4
    embedding = network.vocab_size * network.hidden_size * (4 if kind == "float32" else 2)
    # the norm of every exit is kept once each
    assert 0 <= network.num_bytes - expected - norms - embedding <= 2 * network.hidden_size * 4
    table = model.get_input_embeddings().weight
    left = {
        id(part.weight)
        for part in model.modules()
        if hasattr(part, "weight") and part.weight.dim() == 2
    }
    assert left == {id(table)}
    assert table.data_ptr() == network.embedding.data_ptr() and table.numel()
    kept = Network(other, exits_of(other, 1, 2), native=kind, keep=True)
    assert kept.num_bytes == network.num_bytes and kept.whole_model() is other
    torch.testing.assert_close(fresh_logits(kept), fresh_logits(network), rtol=0, atol=0)
    with torch.no_grad():
        rows = [other(torch.tensor([text])).logits[0, -1] for text in TEXTS]
    wanted = torch.stack(rows)
    error = float((fresh_logits(kept) - wanted).norm() / wanted.norm())
    assert error < {"float32": 1e-6, "bfloat16": 0.02, "int8": 0.1}[kind]


def test_bytes_of_torchs_own_weights():
    model = family_model("qwen2", tied=True).requires_grad_(False)
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    assert Network(model, exits_of(model, 1), packed=False).num_bytes == size
    packed = Network(model, exits_of(model, 1))
    matrices = [*packed.layers[0].__dict__.values(), packed.readouts[4].head]
    if all(one.packed is not None for one in matrices if isinstance(one, Matrix)):
        biases = sum(4 * one.numel() for one in model.parameters() if one.dim() == 1)
        assert packed.num_bytes == 2 * size - biases  # a tied head is packed once


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_packed_from_what_is_stored(stored, tmp_path, monkeypatch):
    """It is loaded in its stored type, and every kind is that of the same numbers in float32."""
    save_nested(tmp_path / "stored", "qwen2", "mlp", dtype=stored, norms=True, heads=True)
    loaded = []

    def load(*given):
        loaded.append(load_with_exits(*given))
        return loaded[-1]

    monkeypatch.setattr("megatron_sorted.decoding.network.load_with_exits", load)
    for dtype in (torch.float32, torch.int8):
        network = load_network(tmp_path / "stored", dtype=dtype)
        assert network.is_native and network.dtype == dtype
        assert loaded[-1][0].model.norm.weight.dtype == stored
        model, exits = load_with_exits(tmp_path / "stored", torch.float32)
        same = Network(model.requires_grad_(False), exits, native=network.kind)
        for depth in (1, 3, 4):
            ours, theirs = fresh_logits(network, depth=depth), fresh_logits(same, depth=depth)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_whole_model_is_read_again_in_its_type(tmp_path):
    case, network = nested(tmp_path, "llama", dtype=torch.int8)
    whole = network.whole_model()
    assert whole is network.whole_model() is not network.model
    assert whole.dtype == torch.float32 and whole.lm_head.weight.numel()
    with torch.no_grad():
        logits = whole(torch.tensor(TEXTS[:1])).logits[0, -1]
        wanted = case.model(torch.tensor(TEXTS[:1])).logits[0, -1]
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    half = load_network(tmp_path, dtype=torch.bfloat16).whole_model()
    assert half.dtype == torch.bfloat16
    torch_run = load_network(tmp_path, native="off")
    assert torch_run.whole_model() is torch_run.model


@pytest.mark.parametrize("rows", [[0], [1, 2], [0, 2], [2]])
@pytest.mark.parametrize("parts", ["block", "adapter and block"])
def test_addresses_stay_true_when_rows_end(rows, parts, tmp_path):
    """The library has the addresses since the first pass; rows are moved and cut off behind it."""
    _, network = nested(tmp_path, "mistral", parts, dtype=torch.int8)
    state = DecodingState(network, 3, 60, (1, 3, 4))
    longest = max(map(len, TEXTS))
    padded = [[*text, *[0] * (longest - len(text))] for text in TEXTS]
    state.append(torch.tensor(padded), list(map(len, TEXTS)))
    state.read(1)
    addresses = [tensor.data_ptr() for tensor in state.memory.tensors()]
    structures = dict(state.memory._structures)
    assert structures
    state.select_rows(rows)
    state.append(torch.tensor([[3]] * len(rows)))
    texts = [[*TEXTS[row], 3] for row in rows]
    for depth in (3, 1, 4):
        state.read(depth)
        got = state.logits(depth, state.last_slots())[:, 0]
        wanted = fresh_logits(network, texts, depth)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert [tensor.data_ptr() for tensor in state.memory.tensors()] == addresses
    assert all(state.memory._structures[key] is made for key, made in structures.items())


def test_a_resized_network_pads_its_logits_and_shares_the_weights():
    _, network = plain_network("llama", kind="int8")
    larger, smaller = network.resized(130), network.resized(90)
    texts = prompts((5, 9, 7), 90)
    here, more, fewer = (fresh_logits(one, texts) for one in (network, larger, smaller))
    assert torch.equal(more[:, :100], here) and torch.equal(fewer, here[:, :90])
    assert more.shape == (3, 130) and bool((more[:, 100:] == float("-inf")).all())
    assert larger.layers is network.layers and larger.vocab_size == 130
    assert larger.kind == "int8" and larger.is_native


MEASURE = """
import sys
import torch
from pathlib import Path
from megatron_sorted.decoding.network import load_network
from megatron_sorted.decoding.native.library import native_library


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


small, large, dtype = sys.argv[1:]
network = load_network(small, dtype=getattr(torch, dtype), native="on")  # all code is loaded
del network
Path("/proc/self/clear_refs").write_text("5")  # the highest size starts anew
before = resident("VmRSS")
network = load_network(large, dtype=getattr(torch, dtype), native="on")
print(resident("VmRSS") - before, resident("VmHWM") - before, network.num_bytes)
"""


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Return the folder of a small model, and of one of 51 MB in float32, in two data types."""
    folder, shapes = tmp_path_factory.mktemp("models"), ((64, 1, 100), (384, 5, 4000))
    for name, (hidden, layers, rows) in zip(("small", "large"), shapes, strict=True):
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=rows,
        )
        model = LlamaForCausalLM(config)
        for dtype in ("float32", "bfloat16"):
            model.to(getattr(torch, dtype)).save_pretrained(folder / f"{name} {dtype}")
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_process_holds_the_weights_once(kind, directories):
    stored = "bfloat16" if kind == "bfloat16" else "float32"
    small, large = (directories / f"{name} {stored}" for name in ("small", "large"))
    command = [sys.executable, "-c", MEASURE, str(small), str(large), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, highest, expected = map(int, done.stdout.split())
    assert 0.9 * expected < grown < 1.1 * expected
    unpacked = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    layer = 4 * (4 * 384 * 384 + 3 * 3 * 384 * 384)
    # a layer, or the head, in float32 and packed beside what is stored
    assert highest < unpacked + 2 * layer + 2e6, "a second copy of the model existed"
