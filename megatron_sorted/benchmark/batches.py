"""Several prompts at once: our ways beside transformers' generate."""

from collections.abc import Mapping, Sequence

from megatron_sorted.benchmark.peer import HUGGING_FACE, peer_run
from megatron_sorted.benchmark.trials import Trial, run_of, try_all
from megatron_sorted.decoding.ways import Sampling, Way
from megatron_sorted.decoding.writer import Writer
from megatron_sorted.reporting.markdown import table


def compare_batches(writer: Writer, ways: Mapping[str, Way], prompts: Sequence[list[int]], max_new_tokens: int,
                    sizes: Sequence[int]) -> dict[int, dict[str, Trial]]:
    """Return {batch size: {way: what it did}}, transformers beside ours."""
    runs = {name: run_of(writer, way, max_new_tokens) for name, way in ways.items()}
    runs[HUGGING_FACE] = peer_run(writer, max_new_tokens, Sampling())
    return {size: try_all(runs, prompts, writer, f"batches of {size}", size) for size in sizes}


def batch_lines(found: Mapping[int, Mapping[str, Trial]]) -> list[str]:
    """Return the section of the page."""
    sizes = list(found)
    rows = []
    for name in found[sizes[0]]:
        row = [name]
        for size in sizes:
            one, base = found[size][name], found[size][HUGGING_FACE]
            row += [f"{one.tokens_per_second:.1f}", f"{one.tokens_per_second / base.tokens_per_second:.2f}x"]
        rows.append(row)
    heads = [head for size in sizes for head in (f"batch {size}: tokens/s", f"over {HUGGING_FACE}")]
    return ["## Batches", "", "The same prompts, so many at once; tokens of all texts over seconds.", "", *table(["way", *heads], rows)]
