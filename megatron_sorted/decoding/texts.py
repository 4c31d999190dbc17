"""The texts that are generated: their limits, their new tokens, and counts of the work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.speculation.steps import StepOutput
from megatron_sorted.decoding.strategies import Full, SamplingParameters, Strategy
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


@dataclass(frozen=True)
class GenerationRequest:
    """Texts to write as one batch.

    Attributes:
        prompts: Tokens of each prompt; lengths may differ.
        strategy: The decoding strategy.
        sampling: How tokens are chosen.
        max_new_tokens: Maximum number of new tokens of a text.
        stop: Stop sequences.
        first_row: Number of the first prompt among those of a larger request: a text's noise
            depends on it.
    """

    prompts: Sequence[Sequence[int]]
    strategy: Strategy = field(default_factory=Full)
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    first_row: int = 0

    @property
    def rows(self) -> range:
        """Return the numbers of the prompts."""
        return range(self.first_row, self.first_row + len(self.prompts))


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


def _why_it_ends(network: Network) -> str:
    """Return why the context ends where it does, if it is for the rotary positions."""
    if network.rope.constant_tokens != network.max_positions:
        return ""
    return (
        f", beyond which its rotary positions ({network.rope.kind}) turn all tokens otherwise, so "
        "that cached keys would be wrong"
    )


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
                f"the model's context of {network.max_positions}{_why_it_ends(network)}. Shorten "
                f"it, or ask for at most "
                f"{max(network.max_positions - len(prompt), 0)}."
            )
        if min(prompt) < 0 or max(prompt) >= network.vocab_size:
            raise DataError(
                f"prompt {row}: a token is not in 0..{network.vocab_size - 1}. "
                "Use the model's own tokenizer."
            )


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
