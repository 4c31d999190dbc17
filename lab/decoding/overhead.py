"""The cost of a token beyond reading the weights.

Whole steps are compared with their matrix products alone and with the memory's speed.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megatron_sorted.conversion.hugging_face.nested_exits import NestedExit
from megatron_sorted.decoding.cache.matrix import Matrix
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.strategies import Full, Strategy
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.decoding.tuning.costs import now

WIDTHS = (1, 2, 4, 8, 16)


def alternate(
    works: dict[str, Callable[[], None]], rounds: int, network: Network
) -> dict[str, list[float]]:
    """Return the seconds of each work in every round; all take turns in being first."""
    names, seconds = list(works), {name: [] for name in works}
    for work in works.values():
        work()
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            began = now(network)
            works[name]()
            seconds[name].append(now(network) - began)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Return the median over rounds of one work's seconds over another's."""
    return statistics.median(
        one / two for one, two in zip(seconds[name], seconds[base], strict=True)
    )


def matrices_of(network: Network) -> list[Matrix]:
    """Return the matrices that one pass through all layers and the last head reads, in order."""
    layers = [
        matrix
        for layer in network.layers
        for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down)
    ]
    return [*layers, network.readouts[network.num_layers].head]


def products(network: Network, rows: int) -> Callable[[], None]:
    """Return a function that computes only the matrix products of a pass over ``rows`` tokens."""
    matrices = matrices_of(network)
    inputs = {
        matrix.weight.size(1): torch.randn(
            1, rows, matrix.weight.size(1), dtype=network.dtype, device=network.device
        )
        for matrix in matrices
    }

    @torch.inference_mode()
    def work() -> None:
        for matrix in matrices:
            matrix(inputs[matrix.weight.size(1)])

    return work


def weight_bytes(network: Network) -> int:
    """Return the bytes of the matrices that one pass reads."""
    return sum(
        matrix.weight.numel() * matrix.weight.element_size() for matrix in matrices_of(network)
    )


def reading(network: Network, size: int) -> Callable[[], None]:
    """Return a function that reads ``size`` bytes once, at the speed of the memory."""
    numbers = torch.ones(size // 4, device=network.device)

    def work() -> None:
        numbers.sum()

    return work


def writing(
    network: Network, prompts: Sequence[list[int]], strategy: Strategy, count: int
) -> Callable[[], None]:
    """Return a function that writes ``count`` tokens after each prompt."""

    def work() -> None:
        generate(network, prompts, strategy, limits=Limits(count))

    return work


def full_exit(model: PreTrainedModel) -> dict[int, NestedExit]:
    """Return the exits of a model with only the last one."""
    return {model.config.num_hidden_layers: NestedExit(model.model.norm, model.lm_head)}


def passes(network: Network, length: int, packed: bool) -> dict[str, Callable[[], None]]:
    """Return passes over 1 to 16 tokens after a text, with packed or torch's plain matrices."""
    used = network if packed else Network(network.model, full_exit(network.model), packed=False)
    state = DecodingState(used, 1, length + max(WIDTHS) + 1, [used.num_layers])
    state.append(torch.randint(used.vocab_size, (1, length), device=used.device))
    with torch.inference_mode():
        state.read(used.num_layers)

    def work_of(width: int) -> Callable[[], None]:
        @torch.inference_mode()
        def work() -> None:
            state.append(torch.zeros(1, width, dtype=torch.long, device=used.device))
            state.read(used.num_layers)
            state.logits(used.num_layers, state.last_slots(width)).argmax(-1).tolist()
            state.crop([length])

        return work

    return {f"{'packed' if packed else 'plain'} {width}": work_of(width) for width in WIDTHS}


def exact_length(model: PreTrainedModel, count: int) -> GenerationConfig:
    """Return transformers' options for ``count`` tokens, the end token among those to choose from.

    The model's own config loses its end token: `generate` fills in from it what options leave out.
    """
    model.generation_config.eos_token_id = None
    return GenerationConfig(
        do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0
    )


def theirs(network: Network, prompts: Sequence[list[int]], count: int) -> Callable[[], None]:
    """Return a function in which transformers writes ``count`` tokens; prompts have one length."""
    ids = torch.tensor(prompts, device=network.device)
    config = exact_length(network.model, count)

    @torch.inference_mode()
    def work() -> None:
        network.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    return work


def full_and_theirs(
    network: Network, batch: int, length: int, count: int, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of a token step of full, transformers, products and memory."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(network.vocab_size, (batch, length), generator=generator).tolist()
    once, size = products(network, batch), weight_bytes(network)
    read = reading(network, size)

    def times(work: Callable[[], None]) -> Callable[[], None]:
        return lambda: [work() for _ in range(count)] and None

    # Both read the prompt. Its time is subtracted by writing a single token as well.
    works = {
        "full": writing(network, prompts, Full(), count + 1),
        "full, one": writing(network, prompts, Full(), 1),
        "transformers": theirs(network, prompts, count + 1),
        "transformers, one": theirs(network, prompts, 1),
        "products": times(once),
        "memory": times(read),
    }
    seconds = alternate(works, rounds, network)
    steps = {
        name: [
            (one - two) / count
            for one, two in zip(seconds[name], seconds[f"{name}, one"], strict=True)
        ]
        for name in ("full", "transformers")
    }
    return steps | {name: [one / count for one in seconds[name]] for name in ("products", "memory")}


def random_network(layers: int, hidden: int, inner: int, heads: int, vocabulary: int) -> Network:
    """Return a LLaMA with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return Network(model, full_exit(model))
