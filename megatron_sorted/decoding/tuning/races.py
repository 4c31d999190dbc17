"""Strategies that write the same texts in turns, so that a noisy machine is as noisy for all."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.strategies import Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.texts import Limits


@dataclass(frozen=True)
class Speed:
    """The measured speed of a strategy.

    Attributes:
        tokens_per_second: Tokens a second, from the median time of each text.
        tokens_per_step: Tokens a step.
    """

    tokens_per_second: float
    tokens_per_step: float


def race(
    generator: TextGenerator,
    strategies: Sequence[Strategy],
    prompts: Sequence[list[int]],
    limits: Limits,
    title: str,
    rounds: int = 1,
) -> list[Speed]:
    """Return the speed of each strategy.

    Each continues a prompt before the next prompt begins, in an order that changes each time, and
    each text is written in each round; a short text before warms up.

    Args:
        generator: The model, and the other model that drafts if there is one.
        strategies: The strategies.
        prompts: Tokens of the prompts.
        limits: Where texts end.
        title: Title of the progress bar.
        rounds: How often each text is written; its median time counts.
    """

    def run(number: int, prompt: list[int], limits: Limits) -> tuple[float, int, int]:
        strategy, began = strategies[number], time.perf_counter()
        draft = generator.draft_for(strategy)
        [text] = generate(generator.network, [prompt], strategy, limits=limits, draft=draft)
        return time.perf_counter() - began, len(text.tokens), text.counts.num_steps

    numbers = list(range(len(strategies)))
    for number in numbers:
        run(number, prompts[0], replace(limits, max_new_tokens=min(8, limits.max_new_tokens)))
    seconds, tokens, steps = ([0.0] * len(numbers) for _ in range(3))
    for turn, prompt in enumerate(tqdm(prompts, title, unit="text")):
        rows: list[list[tuple[float, int, int]]] = [[] for _ in numbers]
        for again in range(rounds):
            first = (turn + again) % len(numbers)
            for number in [*numbers[first:], *numbers[:first]]:
                rows[number].append(run(number, prompt, limits))
        for number, row in enumerate(rows):
            seconds[number] += statistics.median(one[0] for one in row)
            tokens[number] += row[0][1]
            steps[number] += row[0][2]
    return [
        Speed(tokens[number] / seconds[number], tokens[number] / steps[number])
        for number in numbers
    ]
