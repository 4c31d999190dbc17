"""Texts that go on: the loop over steps, where texts end, and what is counted of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_sorted.decoding.cache.capacity import (
    as_memory_error,
    bytes_needed,
    check_cache_memory,
)
from megatron_sorted.decoding.cache.state import State
from megatron_sorted.decoding.cache.transfer import to_device
from megatron_sorted.decoding.choice import check_strategy
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.sampling import Sampler
from megatron_sorted.decoding.speculation.steps import (
    Chain,
    DecodingBatch,
    OneToken,
    StepOutput,
    stops_of,
)
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
from megatron_sorted.errors import DataError, SettingsError


@dataclass(frozen=True)
class Limits:
    """Where a text ends.

    Attributes:
        max_new_tokens: At most so many are added.
        end_ids: Tokens after which it is over.
        stop: Texts after which it is over; they are cut off. Needs ``to_text``.
        to_text: Text of the tokens that were added.
    """

    max_new_tokens: int = 128
    end_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    to_text: Callable[[list[int]], str] | None = None

    def __post_init__(self) -> None:
        """Refuse limits that mean nothing.

        Raises:
            SettingsError: One of them.
        """
        if self.max_new_tokens < 0:
            raise SettingsError(
                f"max_new_tokens: {self.max_new_tokens} is not 0 or more. Change it."
            )
        if not all(self.stop):
            raise SettingsError(
                "stop: a stop word is empty, and would end every text at once. Leave it out."
            )
        if self.stop and self.to_text is None:
            raise SettingsError("stop: words need to_text, which makes text of tokens. Give both.")

    def ends(self, tokens: list[int]) -> bool:
        """Return whether the newest token completes a stop word."""
        if not self.stop:
            return False
        text = self.to_text(tokens)
        return any(word in text for word in self.stop)


@dataclass
class Counts:
    """What one text took.

    Attributes:
        num_steps: Times that the model was asked; each adds at least one token.
        num_drafted, num_accepted: Drafted tokens, and those of them in the text.
        depths: Exit of every added token.
    """

    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    depths: list[int] = field(default_factory=list)


@dataclass
class Text:
    """One text.

    Attributes:
        tokens: That were added; with a stop text those up to it, whole.
        finish: Why it is over: "eos", "stop" or "length"; None while it is not.
        counts: What it took.
    """

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    counts: Counts = field(default_factory=Counts)

    def take(self, added: "Added") -> None:
        """Add what a step gave."""
        self.tokens += added.tokens
        self.finish = added.finish
        self.counts.num_steps += 1
        self.counts.num_drafted += added.num_drafted
        self.counts.num_accepted += added.num_accepted
        self.counts.depths += added.depths


@dataclass(frozen=True)
class Added:
    """Tokens that a step added to a text.

    Attributes:
        row: Of the prompts.
        tokens, depths: And the exits that said them.
        num_drafted, num_accepted: See `Counts`.
        finish: See `Text`.
    """

    row: int
    tokens: list[int]
    depths: list[int]
    num_drafted: int
    num_accepted: int
    finish: str | None


def check_prompts(prompts: Sequence[Sequence[int]], network: Network, max_new_tokens: int) -> None:
    """Check that all prompts can be gone on with.

    Raises:
        DataError: One is empty, has unknown tokens, or does not fit.
    """
    if not prompts:
        raise DataError("prompts: there are none. Give at least one.")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(
                f"prompt {row}: it is empty. Give at least one token, such as the tokenizer's bos."
            )
        # before its tokens are looked at: there may be millions
        if len(prompt) + max_new_tokens > network.max_positions:
            raise DataError(
                f"prompt {row}: {len(prompt)} tokens and {max_new_tokens} new ones are more than the model's context of "
                f"{network.max_positions}. Shorten it, or ask for at most {max(network.max_positions - len(prompt), 0)}."
            )
        if min(prompt) < 0 or max(prompt) >= network.vocab_size:
            raise DataError(
                f"prompt {row}: a token is not in 0..{network.vocab_size - 1}. Use the model's own tokenizer."
            )


def make_step(strategy: Strategy, batch: DecodingBatch) -> OneToken | Chain | TreeStep:
    """Return what does a step of the way."""
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


def start_batch(
    network: Network,
    prompts: Sequence[Sequence[int]],
    strategy: Strategy,
    sampling: SamplingParameters,
    max_new_tokens: int,
    draft: Network | None,
) -> DecodingBatch:
    """Return the texts with their prompts, nothing read yet."""
    capacity = max(map(len, prompts)) + max_new_tokens + draft_slots(strategy) + 1
    own = (
        [strategy.depth]
        if isinstance(strategy, Fixed)
        else stops_of(
            network,
            strategy.depths
            if isinstance(strategy, EarlyExit)
            else ()
            if draft
            else draft_depths(strategy),
        )
    )
    check_cache_memory(
        network,
        len(prompts),
        capacity,
        own,
        0 if draft is None else bytes_needed(draft, len(prompts), capacity, draft_depths(strategy)),
    )
    longest = max(map(len, prompts))
    padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    states = [State(network, len(prompts), capacity, own)]
    if draft is not None:
        states.append(State(draft, len(prompts), capacity, draft_depths(strategy)))
    for state in states:
        state.append(to_device(padded, state.device), [len(prompt) for prompt in prompts])
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(
            len(prompts), network.vocab_size, dtype=torch.bool, device=network.device
        )
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
    return DecodingBatch(
        states[0],
        Sampler(sampling, range(len(prompts))),
        seen,
        states[1] if draft is not None else None,
    )


@torch.inference_mode()
def stream(
    network: Network,
    prompts: Sequence[Sequence[int]],
    strategy: Strategy | None = None,
    sampling: SamplingParameters | None = None,
    limits: Limits | None = None,
    draft: Network | None = None,
) -> Iterator[Added]:
    """Yield what each step adds to each text, until all are over.

    Args:
        network: The model.
        prompts: Tokens of each text so far, of any lengths.
        way: How to generate; `Full` by default.
        sampling: How tokens are chosen; greedily by default.
        limits: Where texts end.
        draft: Another model that drafts, of the same vocabulary.

    Raises:
        SettingsError: The way does not fit the model.
        DataError: A prompt cannot be gone on with.
        MemoryExhaustedError: The texts do not fit into memory.
    """
    strategy, sampling, limits = (
        strategy or Full(),
        sampling or SamplingParameters(),
        limits or Limits(),
    )
    check_strategy(strategy, network, draft)
    check_prompts(prompts, network, limits.max_new_tokens)
    if limits.max_new_tokens < 1:
        return
    with as_memory_error():
        batch = start_batch(network, prompts, strategy, sampling, limits.max_new_tokens, draft)
        texts, rows, step = (
            [Text() for _ in prompts],
            list(range(len(prompts))),
            make_step(strategy, batch),
        )
        while rows:
            said = step.step()
            for row, one in zip(rows, said, strict=True):
                added = cut(texts[row], one, row, limits)
                texts[row].take(added)
                yield added
            going_on = [place for place, row in enumerate(rows) if texts[row].finish is None]
            if len(going_on) < len(rows):
                rows = [rows[place] for place in going_on]
                if rows:
                    batch.select_rows(going_on)


def cut(text: Text, said: StepOutput, row: int, limits: Limits) -> Added:
    """Return what a step adds to a text: no more than up to where it is over."""
    kept, finish = list(text.tokens), None
    for token in said.tokens:
        kept.append(token)
        if token in limits.end_ids:
            finish = "eos"
        elif limits.ends(kept):
            finish = "stop"
        elif len(kept) == limits.max_new_tokens:
            finish = "length"
        if finish:
            break
    count = len(kept) - len(text.tokens)
    return Added(
        row,
        said.tokens[:count],
        said.depths[:count],
        said.num_drafted,
        min(said.num_accepted, count),
        finish,
    )


def generate(
    network: Network,
    prompts: Sequence[Sequence[int]],
    strategy: Strategy | None = None,
    sampling: SamplingParameters | None = None,
    limits: Limits | None = None,
    draft: Network | None = None,
) -> list[Text]:
    """Return all texts when they are over; arguments and errors as for `stream`."""
    texts = [Text() for _ in prompts]
    for added in stream(network, prompts, strategy, sampling, limits, draft):
        texts[added.row].take(added)
    return texts
