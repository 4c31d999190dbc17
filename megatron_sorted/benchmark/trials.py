"""Strategies timed on the same prompts.

All strategies run on a batch before the next one, so that a noisy machine is noisy for all.
Conversations whose answers are scored are in `contest`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.strategies import Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.decoding.tuning.costs import now
from megatron_sorted.errors import SettingsError

FULL = "full"
"""Name of the strategy that all others are compared with."""

Run = Callable[[list[list[int]]], tuple[list[list[int]], int]]
"""Function from prompts to their new tokens and the number of steps of all (0 if unknown)."""


@dataclass
class StrategyTrial:
    """The measurements of one strategy with all prompts.

    Attributes:
        texts: New tokens of each prompt.
        seconds: Seconds of each batch.
        num_steps: Number of steps of all texts; 0 if unknown.
    """

    texts: list[list[int]]
    seconds: list[float]
    num_steps: int = 0

    @property
    def num_tokens(self) -> int:
        """Return the number of new tokens."""
        return sum(map(len, self.texts))

    @property
    def tokens_per_second(self) -> float:
        """Return the new tokens per second, including the time for the prompts."""
        return self.num_tokens / sum(self.seconds)

    @property
    def tokens_per_step(self) -> float:
        """Return the new tokens per step."""
        return self.num_tokens / self.num_steps if self.num_steps else float("nan")


def encode_prompts(
    generator: TextGenerator, texts: Sequence[str], are_questions: bool, max_new_tokens: int
) -> list[list[int]]:
    """Return the tokens of prompts, truncated at the front to what the context leaves.

    Args:
        generator: The model.
        texts: The prompts.
        are_questions: Whether they are a user's messages, not texts to continue.
        max_new_tokens: Maximum number of new tokens.

    Raises:
        SettingsError: The new tokens fill the context.
    """
    positions = generator.network.max_positions
    if max_new_tokens >= positions:
        raise SettingsError(
            f"--max-new-tokens: {max_new_tokens} fill the context of {positions}. Ask for fewer."
        )
    ids = [
        generator.encode_chat([{"role": "user", "content": text}])
        if are_questions
        else generator.encode(text)
        for text in texts
    ]
    return [prompt[max_new_tokens - positions :] for prompt in ids]


def run_of(generator: TextGenerator, strategy: Strategy, max_new_tokens: int) -> Run:
    """Return a function that runs one of our strategies greedily."""
    limits = Limits(max_new_tokens, generator.end_ids)

    def run(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        texts = generate(
            generator.network, prompts, strategy, limits=limits, draft=generator.draft_for(strategy)
        )
        return [text.tokens for text in texts], sum(text.counts.num_steps for text in texts)

    return run


def share_same(trial: StrategyTrial, base: StrategyTrial) -> float:
    """Return the share of tokens before the first one in which a text differs from the base's."""
    same = 0
    for text, other in zip(trial.texts, base.texts, strict=True):
        pairs = enumerate(zip(text, other, strict=False))
        shorter = min(len(text), len(other))
        same += next((index for index, (one, two) in pairs if one != two), shorter)
    return same / max(base.num_tokens, 1)


def run_all(
    runs: Mapping[str, Run],
    prompts: Sequence[list[int]],
    generator: TextGenerator,
    title: str,
    batch: int = 1,
) -> dict[str, StrategyTrial]:
    """Run every strategy on all prompts; the one that begins changes from batch to batch.

    Args:
        runs: Functions to run, by name.
        prompts: The prompts.
        generator: The model, whose device is waited for.
        title: Title of the progress bar.
        batch: Batch size; fewer prompts are repeated.
    """
    names, trials = list(runs), {name: StrategyTrial([], []) for name in runs}
    for run in runs.values():  # warm up
        run([prompts[0][:8]] * batch)
    enough = list(prompts) * -(-batch // len(prompts))
    batches = [enough[first : first + batch] for first in range(0, len(enough) - batch + 1, batch)]
    for number, some in enumerate(tqdm(batches, title, unit="batch" if batch > 1 else "prompt")):
        for index in range(number, number + len(names)):
            name = names[index % len(names)]
            began = now(generator.network)
            texts, steps = runs[name](some)
            trials[name].seconds.append(now(generator.network) - began)
            trials[name].texts += texts
            trials[name].num_steps += steps
    return trials
