"""The contenders: our decoder by its library and by torch, transformers, and llama.cpp."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from lab.decoding.overhead import exact_length
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.strategies import Strategy
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.llama_cpp.server import Completion, LlamaServer

OURS, BY_TORCH, TRANSFORMERS, LLAMA = "ours", "ours by torch", "transformers", "llama.cpp"
"""Engines."""


@dataclass(frozen=True)
class Turn:
    """What a contender did with some prompts.

    Attributes:
        tokens: The new tokens of each.
        seconds: Our clock's seconds for all of it.
        own: Times of an engine that measures itself; None for the others.
        num_drafted, num_accepted: Numbers of drafted and accepted tokens.
    """

    tokens: list[list[int]]
    seconds: float
    own: list[Completion] | None = None
    num_drafted: int = 0
    num_accepted: int = 0


@dataclass(frozen=True)
class Entry:
    """How a contender is listed.

    Attributes:
        name: Name, unique in a match.
        engine: One of the engines above.
        kind: Kind of weights as the engine calls it.
        strategy: Name of the decoding strategy; "full" where every token is computed alone.
        num_bytes: Bytes of the weights that a pass of one token reads.
    """

    name: str
    engine: str
    kind: str
    strategy: str
    num_bytes: int


class Contender(Protocol):
    """Something that continues prompts greedily."""

    entry: Entry

    def write(self, prompts: Sequence[list[int]], num_tokens: int, at_once: bool) -> Turn:
        """Continue each prompt by exactly this number of tokens, one by one or all at once."""


class Ours:
    """Our decoder with a strategy."""

    def __init__(self, entry: Entry, network: Network, strategy: Strategy):
        self.entry, self.network, self.strategy = entry, network, strategy

    def write(self, prompts: Sequence[list[int]], num_tokens: int, at_once: bool) -> Turn:
        """Continue prompts; see `Contender`."""
        groups = [list(prompts)] if at_once else [[prompt] for prompt in prompts]
        start, texts = time.perf_counter(), []
        for group in groups:
            texts += generate(self.network, group, self.strategy, limits=Limits(num_tokens))
        seconds = time.perf_counter() - start
        return Turn(
            [text.tokens for text in texts],
            seconds,
            None,
            sum(text.counts.num_drafted for text in texts),
            sum(text.counts.num_accepted for text in texts),
        )


class Transformers:
    """transformers' own generate; prompts at once must have one length."""

    def __init__(self, entry: Entry, model: nn.Module):
        self.entry, self.model = entry, model

    @torch.inference_mode()
    def write(self, prompts: Sequence[list[int]], num_tokens: int, at_once: bool) -> Turn:
        """Continue prompts; see `Contender`."""
        config = exact_length(self.model, num_tokens)
        groups = [list(prompts)] if at_once else [[prompt] for prompt in prompts]
        start, tokens = time.perf_counter(), []
        for group in groups:
            ids = torch.tensor(group)
            mask = torch.ones_like(ids)
            whole = self.model.generate(ids, attention_mask=mask, generation_config=config)
            tokens += whole[:, ids.size(1) :].tolist()
        return Turn(tokens, time.perf_counter() - start)


class Llama:
    """A llama-server."""

    def __init__(self, entry: Entry, server: LlamaServer):
        self.entry, self.server = entry, server

    def write(self, prompts: Sequence[list[int]], num_tokens: int, at_once: bool) -> Turn:
        """Continue prompts; see `Contender`."""
        start = time.perf_counter()
        if at_once:
            done = self.server.complete_all(list(prompts), num_tokens)
        else:
            done = [self.server.complete(prompt, num_tokens) for prompt in prompts]
        seconds = time.perf_counter() - start
        return Turn(
            [one.tokens for one in done],
            seconds,
            done,
            sum(one.num_drafted for one in done),
            sum(one.num_accepted for one in done),
        )


def weights_read(model: nn.Module) -> int:
    """Return the bytes of a transformers model that a token reads; of an untied embedding, none."""
    embedding = model.get_input_embeddings().weight
    whole = sum(one.numel() * one.element_size() for one in model.parameters())
    tied = model.get_output_embeddings().weight is embedding
    return whole - (0 if tied else embedding.numel() * embedding.element_size())


def packed_bytes(network: Network) -> int:
    """Return the bytes that a token of the compiled library reads: all but the embedding.

    Exits' own parts are not read by a token of the full model, but are counted.
    """
    return network.num_bytes - network.embedding.nbytes
