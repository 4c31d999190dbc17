"""Every strategy in every kind of weights writes the text that `full` of that kind writes.

`tests/unit/test_decoding_strategies.py` shows it for float32, where transformers is the reference.
"""

import copy
from itertools import chain

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.speculation.steps import run_step
from megatron_sorted.decoding.strategies import (
    EarlyExit,
    Full,
    SamplingParameters,
    SelfSpeculative,
    SortedSpeculative,
    TreeSpeculative,
)
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.serving.token_logprobs import logprobs_of
from tests.support.decoding import KINDS, needs_native, nested, plain_network, prompts

NUM_TOKENS = 30
SHORT = (
    SelfSpeculative(2, 5),
    SortedSpeculative((1, 3), (0.5, 0.2), 6, "margin"),
    TreeSpeculative((1, 3), (0.4,), 4, 3, 9, 1),
)
STRATEGIES = (
    *SHORT,
    SelfSpeculative(1, 1),
    SelfSpeculative(3, 16),
    SortedSpeculative((2,), (0.0,), 12, "entropy"),
    TreeSpeculative((2,), (), 6, 1, 6),
    TreeSpeculative((2,), (), 3, 5, 40),
)
SAMPLED = SamplingParameters(0.7, top_k=8, top_p=0.9, repetition_penalty=1.3, seed=4)
GREEDY = SamplingParameters()
NATIVE = [pytest.param(kind, marks=needs_native) for kind in ("bfloat16", "int8")]


def name_of(strategy) -> str:
    return "-".join(map(str, (strategy.name, *vars(strategy).values())))


def written(network, texts, strategy=None, sampling=GREEDY, **more) -> list[list[int]]:
    """Return the new tokens of texts that are written together."""
    limits = Limits(NUM_TOKENS)
    return [text.tokens for text in generate(network, texts, strategy, sampling, limits, **more)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=name_of)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["torch", *NATIVE])
def test_a_batch_is_what_full_writes(kind, sampling, strategy):
    """The float32 of torch is here, since other tests use the library where it can be built."""
    _, network = plain_network("llama", kind=kind)
    texts = prompts((11, 3, 24), 100)
    wanted = written(network, texts, Full(), sampling)
    assert written(network, texts, strategy, sampling) == wanted
    if sampling == GREEDY:  # a sampled row's noise is that of its number
        assert wanted == list(chain.from_iterable(written(network, [text]) for text in texts))
        assert len({tuple(text) for text in wanted}) == 3


@pytest.mark.parametrize("strategy", SHORT, ids=lambda one: one.name)
@pytest.mark.parametrize("kind", NATIVE)
def test_windows_shorter_than_the_texts(kind, strategy):
    _, network = plain_network("mistral", kind=kind)
    texts = prompts((11, 3, 24), 100)
    assert written(network, texts, strategy) == written(network, texts)


@pytest.mark.parametrize("parts", ["block", "adapter and block", "mlp"])
@pytest.mark.parametrize("kind", NATIVE)
def test_exits_with_their_own_parts_draft(kind, parts, tmp_path):
    dtype = getattr(torch, kind)
    _, network = nested(tmp_path, "qwen3", parts, dtype, norms=True, tied=True)
    texts = prompts((5, 12), 100)
    wanted = written(network, texts)
    for strategy in SHORT[1:]:
        assert written(network, texts, strategy) == wanted


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", NATIVE)
def test_another_model_drafts(kind, sampling):
    _, network = plain_network("llama", kind=kind)
    draft = plain_network("qwen3", kind=kind)[1].resized(90).resized(100)
    texts = prompts((5, 12, 8), 90)
    wanted = written(network, texts, Full(), sampling)
    for strategy in (SelfSpeculative(2, 4), SortedSpeculative((1, 2), (0.5, 0.2), 5), SHORT[2]):
        assert written(network, texts, strategy, sampling, draft=draft) == wanted


def whole(network, text, depth, first) -> torch.Tensor:
    """Return an exit's logits [n, v] from position ``first`` on, all tokens read in one pass."""
    state = DecodingState(network, 1, len(text), (depth,))
    state.append(torch.tensor([text]))
    state.read(depth)
    return state.logits(depth, torch.arange(first, len(text))[None])[0]


@pytest.mark.parametrize("kind", [*NATIVE, pytest.param("float32", marks=needs_native)])
def test_a_text_is_what_one_pass_over_it_chooses(kind):
    """The reference is one pass over the whole text, ours are passes of one token."""
    _, network = plain_network("mistral", kind=kind)
    texts = prompts((9, 30), 100)
    for text, new in zip(texts, written(network, texts), strict=True):
        logits_nv = whole(network, [*text, *new[:-1]], 4, len(text) - 1)
        assert logits_nv.argmax(-1).tolist() == new


@pytest.mark.parametrize("kind", NATIVE)
def test_tokens_exit_at_the_first_confident_exit_and_are_filled_later(kind):
    _, network = plain_network("llama", kind=kind)
    texts, wanted, depths, measure = prompts((7, 19), 100), [], [], "margin"
    some = prompts((60,), 100)[0]
    thresholds = tuple(
        float(CONFIDENCE[measure](whole(network, some, depth, 0)).quantile(0.6)) for depth in (1, 3)
    )
    for text in texts:
        wanted.append([])
        depths.append([])
        for _ in range(NUM_TOKENS):
            read = [*text, *wanted[-1]]
            for depth, threshold in ((1, thresholds[0]), (3, thresholds[1]), (4, -1)):
                logits = whole(network, read, depth, len(read) - 1)[0]
                if CONFIDENCE[measure](logits) > threshold:
                    break
            wanted[-1].append(int(logits.argmax()))
            depths[-1].append(depth)
    early = generate(network, texts, EarlyExit((1, 3), thresholds, measure), GREEDY, Limits(30))
    assert [text.tokens for text in early] == wanted
    assert [text.counts.depths for text in early] == depths
    assert {1, 3, 4} == set(chain(*depths))


@needs_native
def test_kinds_differ_by_what_rounding_costs():
    """All kinds are near float32, in the order of their rounding, and none is another one."""
    text = prompts((40,), 100)[0]
    base = whole(plain_network("llama", kind="torch")[1], text, 4, 0)
    away = {
        kind: float((whole(plain_network("llama", kind=kind)[1], text, 4, 0) - base).norm())
        for kind in KINDS[1:]
    }
    size = float(base.norm())
    assert away["float32"] < 1e-5 * size < 1e-4 * size < away["bfloat16"] < 0.02 * size
    assert away["bfloat16"] < away["int8"] < 0.05 * size


class Rounded(nn.Module):
    """A linear module as the kinds define it: inputs and weights rounded, products summed exactly.

    int8: groups of 64 inputs, whose largest number becomes 127.
    """

    def __init__(self, linear: nn.Linear, kind: str):
        super().__init__()
        self.kind, self.bias = kind, linear.bias
        self.weight = self.rounded(linear.weight)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "bfloat16":
            return x.bfloat16().double()
        missing = -x.size(-1) % 64
        groups = nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, 64))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        whole = (groups * (127 / groups.abs().amax(-1, keepdim=True).clamp(min=1e-30))).round()
        return (whole.double() * scale.double()).flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = (self.rounded(x) @ self.weight.T).float()
        return product if self.bias is None else product + self.bias


class RoundedCache(DynamicCache):
    """Keys and values in bfloat16."""

    def update(self, keys, values, *arguments, **more):
        keys, values = (x.bfloat16().float() for x in (keys, values))
        return super().update(keys, values, *arguments, **more)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", NATIVE)
def test_logits_are_those_of_rounded_weights_and_inputs(kind, family):
    """The reference is transformers' own model with other linear modules, keys and values.

    An input that lies between two whole numbers may be rounded to the other one, so the difference
    is small beside what rounding costs.
    """
    case, network = plain_network(family, kind=kind)
    model, text = copy.deepcopy(case.model), prompts((40,), 100)[0]
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Rounded(child, kind))
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        exact = case.model(torch.tensor([text])).logits[0]
        table.copy_(table.bfloat16())
        wanted = model(torch.tensor([text]), past_key_values=RoundedCache()).logits[0]
    got = whole(network, text, 4, 0)
    cost = float((exact - wanted).norm())
    assert float((got - wanted).norm()) < 0.25 * cost and cost > 1e-4 * float(exact.norm())


@pytest.mark.parametrize("kind", ["torch", *NATIVE])
def test_scores_come_from_the_passes_that_write(kind):
    """130 positions are scored in pieces of 64."""
    _, network = plain_network("mistral", kind=kind)
    [text] = prompts((100,), 100)
    [new] = written(network, [text])
    state = DecodingState(network, 1, len(text) + len(new), [4])
    scoring = logprobs_of(state, [*text, *new], 1, 2)
    scored = run_step(scoring)
    wanted = whole(network, [*text, *new[:-1]], 4, 0).log_softmax(-1)
    own = wanted.gather(1, torch.tensor([*text[1:], *new])[:, None])[:, 0]
    close = 1e-4 if kind == "torch" else 0  # torch's passes of other sizes round differently
    got = torch.tensor([value for value, _ in scored])
    torch.testing.assert_close(got, own, rtol=close, atol=close)
    assert [top[0][0] for _, top in scored[99:]] == new


class Products(TorchDispatchMode):
    """Collects the names of torch's operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("strategy", [Full(), *SHORT], ids=lambda one: one.name)
def test_torch_computes_no_product(strategy):
    products = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_linear_pointwise"}
    for kind in ("torch", "int8"):
        _, network = plain_network("llama", kind=kind)
        with Products() as seen:
            written(network, prompts((5, 9), 100), strategy)
        used = {name for name in seen.names if name in products or "attention" in name}
        assert bool(used) == (kind == "torch")
