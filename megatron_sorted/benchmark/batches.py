"""Several prompts at once: our ways beside transformers' generate."""

from collections.abc import Mapping, Sequence

from megatron_sorted.benchmark.peer import HUGGING_FACE, peer_run
from megatron_sorted.benchmark.trials import StrategyTrial, run_of, try_all
from megatron_sorted.decoding.strategies import SamplingParameters, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.reporting.markdown import table


def compare_batches(
    writer: TextGenerator,
    strategies: Mapping[str, Strategy],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sizes: Sequence[int],
) -> dict[int, dict[str, StrategyTrial]]:
    """Return {batch size: {way: what it did}}, transformers beside ours."""
    runs = {name: run_of(writer, strategy, max_new_tokens) for name, strategy in strategies.items()}
    runs[HUGGING_FACE] = peer_run(writer, max_new_tokens, SamplingParameters())
    return {size: try_all(runs, prompts, writer, f"batches of {size}", size) for size in sizes}


def batch_lines(found: Mapping[int, Mapping[str, StrategyTrial]]) -> list[str]:
    """Return the section of the page."""
    sizes = list(found)
    rows = []
    for name in found[sizes[0]]:
        row = [name]
        for size in sizes:
            one, base = found[size][name], found[size][HUGGING_FACE]
            row += [
                f"{one.tokens_per_second:.1f}",
                f"{one.tokens_per_second / base.tokens_per_second:.2f}x",
            ]
        rows.append(row)
    heads = [head for size in sizes for head in (f"batch {size}: tokens/s", f"over {HUGGING_FACE}")]
    return [
        "## Batches",
        "",
        "The same prompts, so many at once; tokens of all texts over seconds.",
        "",
        *table(["way", *heads], rows),
    ]
