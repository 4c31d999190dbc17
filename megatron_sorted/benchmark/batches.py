"""The speed of decoding strategies on batches of prompts, beside transformers' generate."""

from collections.abc import Mapping, Sequence

from megatron_sorted.benchmark.peer import HUGGING_FACE, peer_run
from megatron_sorted.benchmark.trials import StrategyTrial, run_all, run_of
from megatron_sorted.decoding.strategies import SamplingParameters, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.reporting.markdown import table


def compare_batches(
    generator: TextGenerator,
    strategies: Mapping[str, Strategy],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sizes: Sequence[int],
) -> dict[int, dict[str, StrategyTrial]]:
    """Run every strategy and transformers with every batch size.

    Returns:
        {batch size: {strategy: trial}}.
    """
    runs = {
        name: run_of(generator, strategy, max_new_tokens) for name, strategy in strategies.items()
    }
    runs[HUGGING_FACE] = peer_run(generator, max_new_tokens, SamplingParameters())
    return {size: run_all(runs, prompts, generator, f"batches of {size}", size) for size in sizes}


def batch_lines(trials: Mapping[int, Mapping[str, StrategyTrial]]) -> list[str]:
    """Return the page's section on batches; argument as `compare_batches` returns it."""
    rows = []
    for name in next(iter(trials.values())):
        speeds = [
            (one[name].tokens_per_second, one[HUGGING_FACE].tokens_per_second)
            for one in trials.values()
        ]
        cells = [(f"{speed:.1f}", f"{speed / base:.2f}x") for speed, base in speeds]
        rows.append([name, *(cell for pair in cells for cell in pair)])
    titles = [(f"batch {size}: tokens/s", f"over {HUGGING_FACE}") for size in trials]
    return [
        "## Batches",
        "",
        "The same prompts in batches; tokens of all texts over seconds.",
        "",
        *table(["strategy", *(title for pair in titles for title in pair)], rows),
    ]
