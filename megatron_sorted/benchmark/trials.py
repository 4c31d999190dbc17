"""Ways timed on the same prompts, each prompt by every way before the next, so that a noisy machine is as noisy for all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from megatron_sorted.decoding.generate import Limits, generate
from megatron_sorted.decoding.strategies import Full, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.tuning.costs import now
from megatron_sorted.errors import SettingsError

FULL = "full"
"""What all others are compared with."""

Run = Callable[[list[list[int]]], tuple[list[list[int]], int]]
"""Goes on with a batch of prompts; returns the new tokens of each and the number of steps of all (0 where nobody tells)."""


@dataclass
class StrategyTrial:
    """What one way did with all prompts.

    Attributes:
        texts: Its new tokens, by prompt.
        seconds: By batch.
        num_steps: Steps of all texts; 0 where nobody tells.
    """

    texts: list[list[int]]
    seconds: list[float]
    num_steps: int = 0

    @property
    def num_tokens(self) -> int:
        """Return the new tokens."""
        return sum(map(len, self.texts))

    @property
    def tokens_per_second(self) -> float:
        """Return new tokens over seconds, reading prompts included."""
        return self.num_tokens / sum(self.seconds)

    @property
    def tokens_per_step(self) -> float:
        """Return new tokens over steps."""
        return self.num_tokens / self.num_steps if self.num_steps else float("nan")


def encode_prompts(
    writer: TextGenerator, texts: Sequence[str], are_asked: bool, max_new_tokens: int
) -> list[list[int]]:
    """Return the tokens of prompts, cut at the front so that what is written fits.

    Args:
        writer: The model.
        texts: The prompts.
        are_asked: Whether they are what a user says, and not texts to go on with.
        max_new_tokens: What is written at most.

    Raises:
        SettingsError: No room is left for a prompt.
    """
    room = writer.network.max_positions - max_new_tokens
    if room < 1:
        raise SettingsError(
            f"--max-new-tokens: {max_new_tokens} fill the context of {writer.network.max_positions}. Ask for fewer."
        )
    ids = [
        writer.encode_chat([{"role": "user", "content": text}])
        if are_asked
        else writer.encode(text)
        for text in texts
    ]
    return [prompt[-room:] for prompt in ids]


def run_of(writer: TextGenerator, strategy: Strategy, max_new_tokens: int) -> Run:
    """Return one of our ways, greedily."""
    limits = Limits(max_new_tokens, writer.end_ids)

    def run(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        texts = generate(
            writer.network, prompts, strategy, limits=limits, draft=writer.draft_for(strategy)
        )
        return [text.tokens for text in texts], sum(text.counts.num_steps for text in texts)

    return run


def share_same(trial: StrategyTrial, base: StrategyTrial) -> float:
    """Return the share of tokens that stand before the first one in which a text differs from the base's."""
    same = 0
    for text, other in zip(trial.texts, base.texts, strict=True):
        pairs = zip(text, other, strict=False)
        same += next(
            (place for place, (one, two) in enumerate(pairs) if one != two),
            min(len(text), len(other)),
        )
    return same / max(base.num_tokens, 1)


def try_all(
    runs: Mapping[str, Run],
    prompts: Sequence[list[int]],
    writer: TextGenerator,
    what: str,
    batch: int = 1,
) -> dict[str, StrategyTrial]:
    """Return what every way did; who begins changes from batch to batch.

    Args:
        runs: By name.
        prompts: To go on with.
        writer: Whose device is waited for.
        what: For the progress bar.
        batch: Prompts that are gone on with at once.
    """
    names, found = list(runs), {name: StrategyTrial([], []) for name in runs}
    for run in runs.values():  # what is made at the first use is not measured
        run([prompts[0][:8]] * batch)
    enough = list(prompts) * -(
        -batch // len(prompts)
    )  # fewer prompts than a batch has room for are asked several times
    batches = [enough[first : first + batch] for first in range(0, len(enough) - batch + 1, batch)]
    for turn, some in enumerate(tqdm(batches, what, unit="batch" if batch > 1 else "prompt")):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            began = now(writer.network)
            texts, steps = runs[name](some)
            found[name].seconds.append(now(writer.network) - began)
            found[name].texts += texts
            found[name].num_steps += steps
    return found


def full_run(writer: TextGenerator, max_new_tokens: int) -> dict[str, Run]:
    """Return {"full": ...}."""
    return {FULL: run_of(writer, Full(), max_new_tokens)}
