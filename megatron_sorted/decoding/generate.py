"""The generation loop: steps until every text has ended, limits of texts, and their counts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_sorted.decoding.cache.capacity import (
    as_memory_error,
    bytes_needed,
    check_cache_memory,
)
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.cache.transfer import to_device
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.requested_strategy import check_strategy
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
        max_new_tokens: Maximum number of new tokens.
        end_ids: Tokens that end a text.
        stop: Sequences that end a text; they need ``to_text``.
        to_text: Function from new tokens to their text.
    """

    max_new_tokens: int = 128
    end_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    to_text: Callable[[list[int]], str] | None = None

    def __post_init__(self) -> None:
        """Check that the limits make sense.

        Raises:
            SettingsError: A limit does not.
        """
        if self.max_new_tokens < 0:
            raise SettingsError(
                f"max_new_tokens: {self.max_new_tokens} is not 0 or more. Change it."
            )
        if not all(self.stop):
            raise SettingsError(
                "stop: a stop sequence is empty, and would end every text at once. Leave it out."
            )
        if self.stop and self.to_text is None:
            raise SettingsError(
                "stop: stop sequences need to_text, which decodes tokens. Give both."
            )

    def ends(self, tokens: list[int]) -> bool:
        """Return whether the newest token completes a stop sequence."""
        if not self.stop:
            return False
        text = self.to_text(tokens)
        return any(sequence in text for sequence in self.stop)


@dataclass
class Counts:
    """Counts of generating one text.

    Attributes:
        num_steps: Number of steps; each adds at least one token.
        num_drafted, num_accepted: Numbers of drafted tokens, and of those in the text.
        depths: Exit of every new token.
    """

    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    depths: list[int] = field(default_factory=list)


@dataclass
class Text:
    """The new tokens of one text.

    Attributes:
        tokens: The new tokens, up to and including a stop sequence.
        finish: Why the text ended: "eos", "stop" or "length"; None while it continues.
        counts: Counts of generating it.
    """

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    counts: Counts = field(default_factory=Counts)

    def add(self, added: "AddedTokens") -> None:
        """Append the tokens of a step."""
        self.tokens += added.tokens
        self.finish = added.finish
        self.counts.num_steps += 1
        self.counts.num_drafted += added.num_drafted
        self.counts.num_accepted += added.num_accepted
        self.counts.depths += added.depths


@dataclass(frozen=True)
class AddedTokens:
    """The tokens that a step added to one text.

    Attributes:
        row: Number of the prompt.
        tokens, depths: The tokens, and the exit that chose each.
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
    """Check that the model can continue all prompts.

    Raises:
        DataError: A prompt is empty, has unknown tokens, or is too long for the context.
    """
    if not prompts:
        raise DataError("prompts: there are none. Give at least one.")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(
                f"prompt {row}: it is empty. Give at least one token, such as the tokenizer's bos."
            )
        # checked before the tokens themselves, of which there may be millions
        if len(prompt) + max_new_tokens > network.max_positions:
            raise DataError(
                f"prompt {row}: {len(prompt)} tokens and {max_new_tokens} new ones are more than "
                f"the model's context of {network.max_positions}. Shorten it, or ask for at most "
                f"{max(network.max_positions - len(prompt), 0)}."
            )
        if min(prompt) < 0 or max(prompt) >= network.vocab_size:
            raise DataError(
                f"prompt {row}: a token is not in 0..{network.vocab_size - 1}. "
                "Use the model's own tokenizer."
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


def start_batch(
    network: Network,
    prompts: Sequence[Sequence[int]],
    strategy: Strategy,
    sampling: SamplingParameters,
    max_new_tokens: int,
    draft: Network | None,
) -> DecodingBatch:
    """Return a batch that holds the prompts and has not run any layer yet."""
    longest = max(map(len, prompts))
    capacity = longest + max_new_tokens + draft_slots(strategy) + 1
    drafting = draft_depths(strategy)
    if isinstance(strategy, Fixed):
        own = [strategy.depth]
    elif isinstance(strategy, EarlyExit):
        own = stops_of(network, strategy.depths)
    else:
        own = stops_of(network, () if draft else drafting)
    draft_bytes = 0 if draft is None else bytes_needed(draft, len(prompts), capacity, drafting)
    check_cache_memory(network, len(prompts), capacity, own, draft_bytes)
    padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    states = [DecodingState(network, len(prompts), capacity, own)]
    if draft is not None:
        states.append(DecodingState(draft, len(prompts), capacity, drafting))
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
    strategy, sampling = strategy or Full(), sampling or SamplingParameters()
    limits = limits or Limits()
    check_strategy(strategy, network, draft)
    check_prompts(prompts, network, limits.max_new_tokens)
    if limits.max_new_tokens < 1:
        return
    with as_memory_error():
        batch = start_batch(network, prompts, strategy, sampling, limits.max_new_tokens, draft)
        texts, rows = [Text() for _ in prompts], list(range(len(prompts)))
        step = make_step(strategy, batch)
        while rows:
            for row, output in zip(rows, step.step(), strict=True):
                added = apply_limits(texts[row], output, row, limits)
                texts[row].add(added)
                yield added
            active = [index for index, row in enumerate(rows) if texts[row].finish is None]
            if len(active) < len(rows):
                rows = [rows[index] for index in active]
                if rows:
                    batch.select_rows(active)


def apply_limits(text: Text, output: StepOutput, row: int, limits: Limits) -> AddedTokens:
    """Return the tokens that a step adds to a text, up to where the text ends."""
    kept, finish = list(text.tokens), None
    for token in output.tokens:
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
    return AddedTokens(
        row,
        output.tokens[:count],
        output.depths[:count],
        output.num_drafted,
        min(output.num_accepted, count),
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
    """Return all texts when they have ended; arguments and errors as for `stream`."""
    texts = [Text() for _ in prompts]
    for added in stream(network, prompts, strategy, sampling, limits, draft):
        texts[added.row].add(added)
    return texts
