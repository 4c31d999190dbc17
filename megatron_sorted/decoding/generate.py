"""The generation loop: steps until every text has ended, limits of texts, and their counts."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sorted.decoding.cache.capacity import (
    as_memory_error,
    bytes_needed,
    check_cache_memory,
)
from megatron_sorted.decoding.cache.joined import ForwardPass
from megatron_sorted.decoding.cache.state import DecodingState, num_slots
from megatron_sorted.decoding.cache.transfer import to_device
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.requested_strategy import check_strategy
from megatron_sorted.decoding.sampling import Sampler
from megatron_sorted.decoding.speculation.steps import Chain, DecodingBatch, OneToken, stops_of
from megatron_sorted.decoding.speculation.tree_steps import TreeStep
from megatron_sorted.decoding.strategies import (
    EarlyExit,
    Fixed,
    Full,
    SamplingParameters,
    SelfSpeculative,
    SortedSpeculative,
    Strategy,
    draft_depths,
    draft_slots,
)
from megatron_sorted.decoding.texts import (
    AddedTokens,
    GenerationRequest,
    Limits,
    Text,
    apply_limits,
    check_prompts,
)


def make_step(strategy: Strategy, batch: DecodingBatch) -> OneToken | Chain | TreeStep:
    """Return the object that runs a step of the strategy."""
    if isinstance(strategy, Full | Fixed):
        return OneToken(batch, [batch.depth])
    if isinstance(strategy, EarlyExit):
        return OneToken(
            batch, [*strategy.depths, batch.depth], strategy.thresholds, strategy.measure
        )
    if isinstance(strategy, SelfSpeculative):
        return Chain(batch, [strategy.depth], None, strategy.num_draft_tokens, "probability")
    if isinstance(strategy, SortedSpeculative):
        return Chain(
            batch, strategy.depths, strategy.thresholds, strategy.num_draft_tokens, strategy.measure
        )
    return TreeStep(batch, strategy)


def stops_for(
    network: Network, strategy: Strategy, draft: Network | None, shared: bool = False
) -> list[int]:
    """Return the depths at which passes of the model must be able to stop.

    Args:
        network: The model.
        strategy: The decoding strategy.
        draft: Another model that drafts; None without one.
        shared: Whether to stop at every exit up to the deepest, so that passes of texts with
            other strategies can be joined.
    """
    if isinstance(strategy, Fixed):
        own = [strategy.depth]
    elif isinstance(strategy, EarlyExit):
        own = stops_of(network, strategy.depths)
    else:
        own = stops_of(network, () if draft else draft_depths(strategy))
    if not shared:
        return own
    return sorted({*own, *(depth for depth in network.depths if depth <= own[-1])})


@dataclass(frozen=True)
class Sizes:
    """The memory that texts need.

    Attributes:
        num_rows: Number of texts.
        capacity: Number of slots of each.
        stops: Depths at which passes of the model stop.
        drafting: Depths at which passes of another model that drafts stop.
        num_bytes, draft_bytes: Bytes of the model's cache, and of the other one's.
    """

    num_rows: int
    capacity: int
    stops: list[int]
    drafting: tuple[int, ...]
    num_bytes: int
    draft_bytes: int


def sizes_of(
    network: Network, request: GenerationRequest, draft: Network | None, shared: bool = False
) -> Sizes:
    """Return the memory that texts need; ``shared`` as for `stops_for`."""
    rows, strategy = len(request.prompts), request.strategy
    longest = max(map(len, request.prompts))
    capacity = longest + request.max_new_tokens + draft_slots(strategy) + 1
    drafting = () if draft is None else draft_depths(strategy)
    stops = stops_for(network, strategy, draft, shared)
    return Sizes(
        rows,
        capacity,
        stops,
        drafting,
        bytes_needed(network, rows, num_slots(capacity), stops),
        0 if draft is None else bytes_needed(draft, rows, num_slots(capacity), drafting),
    )


def sizes_that_fit(network: Network, request: GenerationRequest, draft: Network | None) -> Sizes:
    """Return the memory that texts need.

    Raises:
        MemoryExhaustedError: The host has less.
    """
    sizes = sizes_of(network, request, draft)
    check_cache_memory(network, sizes.num_rows, sizes.capacity, sizes.stops, sizes.draft_bytes)
    return sizes


def start_batch(
    network: Network, request: GenerationRequest, draft: Network | None, sizes: Sizes | None = None
) -> DecodingBatch:
    """Return a batch that holds the prompts and has not run any layer yet."""
    sizes = sizes or sizes_of(network, request, draft)
    prompts, longest = request.prompts, max(map(len, request.prompts))
    padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    states = [DecodingState(network, len(prompts), sizes.capacity, sizes.stops)]
    if draft is not None:
        states.append(DecodingState(draft, len(prompts), sizes.capacity, sizes.drafting))
    for state in states:
        state.append(to_device(padded, state.device), [len(prompt) for prompt in prompts])
    seen = None
    if request.sampling.repetition_penalty != 1.0:
        seen = torch.zeros(
            len(prompts), network.vocab_size, dtype=torch.bool, device=network.device
        )
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
    return DecodingBatch(
        states[0],
        Sampler(request.sampling, request.rows),
        seen,
        states[1] if draft is not None else None,
    )


Writing = Generator[ForwardPass | AddedTokens, Tensor | None, None]
"""Texts that are being written: yields passes, is sent their logits, and yields new tokens."""


def write_batch(batch: DecodingBatch, request: GenerationRequest, limits: Limits) -> Writing:
    """Yield passes, and the tokens that each step adds, until all texts have ended."""
    texts, rows = {row: Text() for row in request.rows}, list(request.rows)
    step = make_step(request.strategy, batch)
    while rows:
        outputs = yield from step.passes()
        for row, output in zip(rows, outputs, strict=True):
            added = apply_limits(texts[row], output, row, limits)
            texts[row].add(added)
            yield added
        active = [index for index, row in enumerate(rows) if texts[row].finish is None]
        if len(active) < len(rows):
            rows = [rows[index] for index in active]
            if rows:
                batch.select_rows(active)


def check_request(request: GenerationRequest, network: Network, draft: Network | None) -> None:
    """Check that the model can write the texts.

    Raises:
        SettingsError: The model does not support the strategy.
        DataError: A prompt cannot be continued.
    """
    check_strategy(request.strategy, network, draft)
    check_prompts(request.prompts, network, request.max_new_tokens)


def run_passes(writing: Writing) -> Iterator:
    """Run the passes of texts one after another, and yield their other outputs."""
    logits = None
    while True:
        try:
            output = writing.send(logits)
        except StopIteration:
            return
        logits = output.run() if isinstance(output, ForwardPass) else None
        if logits is None:
            yield output


@torch.inference_mode()
def stream(
    network: Network,
    prompts: Sequence[Sequence[int]],
    strategy: Strategy | None = None,
    sampling: SamplingParameters | None = None,
    limits: Limits | None = None,
    draft: Network | None = None,
) -> Iterator[AddedTokens]:
    """Yield the tokens that each step adds to each text, until all texts have ended.

    Args:
        network: The model.
        prompts: Tokens of each prompt; lengths may differ.
        strategy: The decoding strategy; `Full` by default.
        sampling: How tokens are chosen; greedy by default.
        limits: Where texts end.
        draft: Another model with the same vocabulary that drafts; None without one.

    Raises:
        SettingsError: The model does not support the strategy.
        DataError: A prompt cannot be continued.
        MemoryExhaustedError: The texts do not fit into memory.
    """
    limits = limits or Limits()
    request = GenerationRequest(
        prompts, strategy or Full(), sampling or SamplingParameters(), limits.max_new_tokens
    )
    check_request(request, network, draft)
    if request.max_new_tokens < 1:
        return
    with as_memory_error():
        sizes = sizes_that_fit(network, request, draft)
        batch = start_batch(network, request, draft, sizes)
        yield from run_passes(write_batch(batch, request, limits))


def generate(
    network: Network,
    prompts: Sequence[Sequence[int]],
    strategy: Strategy | None = None,
    sampling: SamplingParameters | None = None,
    limits: Limits | None = None,
    draft: Network | None = None,
) -> list[Text]:
    """Return all texts when they have ended; arguments and errors as for `stream`."""
    texts = [Text() for _ in prompts]
    for added in stream(network, prompts, strategy, sampling, limits, draft):
        texts[added.row].add(added)
    return texts
