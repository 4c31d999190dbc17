"""Measure what a token of decoding costs beyond reading the weights, beside transformers' generate.

    python -m lab.bench_decoding                a LLaMA of 52 million random parameters, whose
                                                values do not change the measurement
    python -m lab.bench_decoding --model MODEL  a Hugging Face directory

All take turns in every round; figures are medians of ratios within a round. Writes
docs/benchmarks/decoding.md.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from lab.benchmarks.pages import command_line
from lab.decoding.overhead import (
    WIDTHS,
    alternate,
    full_and_theirs,
    passes,
    random_network,
    ratio,
    weight_bytes,
)
from lab.results.pages import page_head
from megatron_sorted.decoding.network import Network, load_network
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reporting.markdown import facts, table

BATCHES = (1, 8)


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="Hugging Face directory (default: random numbers)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="written in a round (%(default)s)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model: tries the measurement, no useful numbers",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/benchmarks"), help="where the page goes"
    )
    return parser.parse_args()


def step_table(network: Network, values: argparse.Namespace) -> list[str]:
    """Return the table of whole steps."""
    rows = []
    for batch in tqdm(BATCHES, "steps", unit="batch size"):
        seconds = full_and_theirs(network, batch, 64, values.tokens, values.rounds)
        for name in seconds:
            rows.append(
                [
                    f"batch {batch}: {name}",
                    f"{1000 * statistics.median(seconds[name]):.2f}",
                    f"{ratio(seconds, name, 'transformers'):.2f}",
                    f"{ratio(seconds, name, 'products'):.2f}",
                    f"{ratio(seconds, name, 'memory'):.2f}",
                ]
            )
    return table(["", "ms a step", "over transformers", "over products", "over memory"], rows)


def pass_table(network: Network, values: argparse.Namespace) -> list[str]:
    """Return the table of passes over several tokens."""
    seconds = alternate(
        passes(network, 256, True) | passes(network, 256, False), values.rounds * 3, network
    )
    rows = [
        [kind, *(f"{ratio(seconds, f'{kind} {width}', 'plain 1'):.2f}" for width in WIDTHS)]
        for kind in ("packed", "plain")
    ]
    return table(["matrices", *(f"{width} tokens" for width in WIDTHS)], rows)


def main() -> None:
    """Measure, and write the page."""
    values = read_arguments()
    if values.model:
        network, what = load_network(values.model, native="off"), values.model.resolve().name
    else:
        shape = (2, 64, 172, 4, 256) if values.quick else (10, 640, 1728, 10, 4096)
        network, what = (
            random_network(*shape),
            "{} layers, hidden {}, feed-forward {}, {} heads, vocabulary {}, random".format(*shape),
        )
    lines = [
        *page_head("Decoding: what a token costs", "what a decoded token costs on a CPU"),
        f"{what}; {weight_bytes(network) / 1e6:.0f} MB of matrices a pass, prompt of 64 tokens,"
        f" {values.tokens} tokens a round, {values.rounds} rounds. *products*: the same matrix"
        " products alone; *memory*: reading as many bytes (a sum over them).",
        "",
        *step_table(network, values),
        "Passes of all layers over several tokens at once after a text of 256, over one token with"
        " torch's plain matrices: verification is cheap because matrices are packed once"
        " (`decoding/cache/matrix.py`).",
        "",
        *pass_table(network, values),
        f"    {command_line()}",
        "",
        *facts(f"{torch.get_num_threads()} threads, fp32", ("torch", "transformers")),
        "",
    ]
    values.output.mkdir(parents=True, exist_ok=True)
    write_text_atomically(values.output / "decoding.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main, "Nothing was written.")
