"""Proves on a model that speculation loses nothing: token for token, in distribution, and how far half precision goes.

    python -m lab.prove_decoding MODEL --questions questions.jsonl
    python -m lab.prove_decoding MODEL --prompt-file prompts.txt --num-tokens 20000 --num-samples 20000

Ways, exits, thresholds, draft lengths, trees, batches, limits and stop words are drawn; what each writes is compared with `full`, greedily
and sampled, in fp32. Then pairs of tokens are sampled by every way and tested (chi-square) against the probabilities that transformers' own
model gives them. Then the first part again in bf16 and fp16, where rounding may decide between tokens that are almost equally likely: how
often, and how close they were. Writes a page. Ends with an error if fp32 differs anywhere, or a distribution does not fit (p < 0.001).
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lab.decoding.proof import (
    Draws,
    ProofComparison,
    compare,
    fit,
    greedy_draft_pairs,
    pairs_expected,
    sample_pairs,
)
from megatron_sorted.benchmark.questions import read_prompts
from megatron_sorted.benchmark.trials import encode_prompts
from megatron_sorted.commands.options.decoding import (
    add_model_options,
    add_prompt_options,
    check_positive,
    check_prompt_options,
    writer_of,
)
from megatron_sorted.decoding.strategies import (
    Full,
    SamplingParameters,
    SelfSpeculative,
    SortedSpeculative,
    TreeSpeculative,
)
from megatron_sorted.errors import SettingsError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reporting.markdown import facts, table

HALVES = ("bfloat16", "float16")
LEAST_P = 0.001


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add_prompt_options(parser, 48)
    parser.add_argument(
        "--most-prompt-tokens",
        type=int,
        default=64,
        help="longer prompts lose their beginning (%(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=96, help="of a text at most (%(default)s)"
    )
    parser.add_argument(
        "--most-rows", type=int, default=8, help="texts of a batch at most (%(default)s)"
    )
    parser.add_argument(
        "--num-tokens", type=int, default=200_000, help="to compare in fp32 (%(default)s)"
    )
    parser.add_argument(
        "--num-half-tokens",
        type=int,
        default=20_000,
        help="to compare in each half precision; 0 for none (%(default)s)",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=100_000,
        help="pairs that each way samples; 0 for none (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/prove_decoding.md"), help="the page (%(default)s)"
    )
    values = parser.parse_args(arguments)
    if values.dtype != "float32":
        raise SettingsError(
            "--dtype: the proof is of fp32, and looks at bf16 and fp16 by itself. Leave it out."
        )
    check_positive(
        values, "max_new_tokens", "num_prompts", "num_tokens", "most_prompt_tokens", "most_rows"
    )
    return values


def comparison_row(name: str, found: ProofComparison) -> list[str]:
    """Return a row of the table of comparisons."""
    close = [one.margin / one.scale for one in found.differences if one.margin == one.margin]
    return [
        name,
        f"{found.num_tokens:,}",
        f"{found.num_texts:,}",
        f"{found.accepted / max(found.drafted, 1):.0%}",
        str(len(found.differences)),
        f"{found.num_same / found.num_tokens:.2%}",
        f"{max(map(abs, close)):.1e}" if close else "",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, samples and writes."""
    values = read_arguments(arguments)
    check_prompt_options(values)
    texts = read_prompts(values.prompt_file, values.questions, values.num_prompts)
    writer = writer_of(values)
    network = writer.network
    if len(network.depths) < 2:
        raise SettingsError(
            "the model has no exits before its last layer, so nothing speculates. Give --depths, or train exits."
        )
    whole = encode_prompts(writer, texts, values.questions is not None, values.max_new_tokens)
    prompts = [prompt[-values.most_prompt_tokens :] for prompt in whole]
    draws = Draws(
        values.max_new_tokens, writer.end_ids, writer.tokenizer.decode, most_rows=values.most_rows
    )
    rows, wrong = [], []
    found = compare(network, prompts, values.num_tokens, values.seed, draws, "fp32")
    rows.append(comparison_row("fp32", found))
    ends = ", ".join(f"{name} {count:,}" for name, count in sorted(found.finishes.items()))
    strategies = ", ".join(f"{name} {count:,}" for name, count in sorted(found.by_strategy.items()))
    if found.differences:
        wrong.append(
            f"fp32: {len(found.differences)} of {found.num_texts} texts differ, first {found.differences[0]}"
        )
    fits, biased = [], None
    if values.num_samples:
        sampling, depths = SamplingParameters(1.0, 50), network.depths[:-1]
        expected = pairs_expected(network, prompts[0], sampling)
        for strategy in (
            Full(),
            SelfSpeculative(depths[0], 2),
            SortedSpeculative(depths, (0.3,) * len(depths), 2),
            TreeSpeculative(depths[:1], (), 2, 3, 6),
        ):
            one = fit(
                sample_pairs(network, prompts[0], strategy, sampling, values.num_samples), expected
            )
            fits.append(
                [
                    strategy.name,
                    f"{one.num_samples:,}",
                    str(one.cells),
                    f"{one.chi_square:.1f}",
                    f"{one.p:.3f}",
                ]
            )
            if one.p < LEAST_P:
                wrong.append(
                    f"{strategy.name}: samples do not fit the distribution, chi-square {one.chi_square:.1f}, p {one.p:.2g}"
                )
        biased = fit(
            greedy_draft_pairs(network, prompts[0], depths[0], sampling, values.num_samples),
            expected,
        )
    for dtype in HALVES if values.num_half_tokens else ():
        other = writer_of(argparse.Namespace(**{**vars(values), "dtype": dtype}))
        rows.append(
            comparison_row(
                dtype,
                compare(other.network, prompts, values.num_half_tokens, values.seed, draws, dtype),
            )
        )
    lines = [
        f"# {values.model.resolve().name}: speculation beside `full`",
        "",
        f"{network.num_layers} layers, exits at {', '.join(map(str, network.depths))}. Drawn ways ({strategies} tokens in fp32), batches of "
        f"1 to {values.most_rows}, limits, stop words, 30 % sampled; texts ended by {ends}.",
        "",
        *table(
            [
                "numbers",
                "tokens",
                "texts",
                "drafts accepted",
                "texts that differ",
                "tokens before a difference",
                "widest",
            ],
            rows,
        ),
        "*widest*: at the first token that differs (greedy texts), how far full's choice was ahead, over the largest logit; the "
        "largest of all differences. bf16 keeps 8 bits (4e-3), fp16 11 (5e-4), fp32 24 (6e-8).",
        "",
    ]
    if fits:
        lines += [
            "Pairs of tokens after one prompt, temperature 1, the 50 likeliest, against the probabilities that transformers' model "
            f"gives {len(expected):,} pairs (chi-square, pairs expected fewer than 5 times together):",
            "",
            *table(["way", "samples", "cells", "chi-square", "p"], fits),
            f"The test sees what is wrong: greedy drafts accepted as if they were samples, as S2D's released code does, give "
            f"chi-square {biased.chi_square:.1f}, p {f'{biased.p:.1g}' if biased.p else 'below 1e-300'}.",
            "",
        ]
    lines += [*facts(f"{torch.get_num_threads()} threads", ("torch", "transformers")), ""]
    write_text_atomically(values.output, "\n".join(lines))
    print("\n".join(lines))
    print(f"written: {values.output}")
    if wrong:
        sys.exit("error: " + "\n".join(wrong))


if __name__ == "__main__":
    run_main(main, "Nothing was written.")
