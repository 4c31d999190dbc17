"""Prove on a model that speculation is lossless: token by token, and in distribution.

    python -m lab.prove_decoding MODEL --questions questions.jsonl
    python -m lab.prove_decoding MODEL --prompt-file prompts.txt --num-tokens 20000

Strategies, exits, thresholds, draft lengths, trees, batches, limits and stop sequences are drawn.
The text of each is compared with that of `full`, greedy and sampled, in fp32. Then every strategy
samples pairs of tokens, which are tested (chi-square) against the probabilities that transformers'
own model gives them. Then the first part is repeated in bf16, int8 and fp16. Where torch runs one
of them, rounding may decide between tokens that are almost equally likely: how often, and how close
they were. Writes a page. Ends with an error if fp32 or a kind that the compiled library runs
differs anywhere, or a distribution does not fit (p < 0.001).
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
from lab.results.pages import page_head
from megatron_sorted.benchmark.questions import read_prompts
from megatron_sorted.benchmark.trials import encode_prompts
from megatron_sorted.commands.options.decoding import (
    add_model_options,
    add_prompt_options,
    check_positive,
    check_prompt_options,
    open_generator,
)
from megatron_sorted.decoding.network import Network
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

OTHERS = ("bfloat16", "int8", "float16")
"""Kinds of weights beside float32; int8 is the compiled library's alone."""
LEAST_P = 0.001


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add_prompt_options(parser, 48)
    parser.add_argument(
        "--most-prompt-tokens",
        type=int,
        default=64,
        help="longer prompts are cut at their beginning (%(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=96,
        help="largest number of tokens of a text (%(default)s)",
    )
    parser.add_argument(
        "--most-rows", type=int, default=8, help="largest number of texts of a batch (%(default)s)"
    )
    parser.add_argument(
        "--num-tokens", type=int, default=200_000, help="tokens to compare in fp32 (%(default)s)"
    )
    parser.add_argument(
        "--num-half-tokens",
        type=int,
        default=100_000,
        help="tokens to compare in each other kind of weights; 0 for none (%(default)s)",
    )
    parser.add_argument(
        "--kinds",
        nargs="*",
        choices=OTHERS,
        default=OTHERS,
        help="other kinds of weights (all; float16 is torch's alone and slow on CPUs)",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=100_000,
        help="pairs that each strategy samples; 0 for none (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of everything that is drawn (%(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/prove_decoding.md"), help="the page (%(default)s)"
    )
    values = parser.parse_args(arguments)
    if values.dtype not in (None, "float32"):
        raise SettingsError(
            "--dtype: the proof runs in fp32, and in the other kinds by itself. Leave it out."
        )
    values.dtype = "float32"
    check_positive(
        values, "max_new_tokens", "num_prompts", "num_tokens", "most_prompt_tokens", "most_rows"
    )
    return values


def comparison_row(name: str, result: ProofComparison) -> list[str]:
    """Return a row of the table of comparisons."""
    close = [one.margin / one.scale for one in result.differences if one.margin == one.margin]
    return [
        name,
        f"{result.num_tokens:,}",
        f"{result.num_texts:,}",
        f"{result.accepted / max(result.drafted, 1):.0%}",
        str(len(result.differences)),
        f"{result.num_same / result.num_tokens:.2%}",
        f"{max(map(abs, close)):.1e}" if close else "",
    ]


def runner(network: Network) -> str:
    """Return what runs a network."""
    return "compiled library" if network.is_native else "torch"


def differing(name: str, result: ProofComparison) -> str:
    """Return the line about texts that differ."""
    return (
        f"{name}: {len(result.differences)} of {result.num_texts} texts differ,"
        f" first {result.differences[0]}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, sample, and write the page."""
    values = read_arguments(arguments)
    check_prompt_options(values)
    texts = read_prompts(values.prompt_file, values.questions, values.num_prompts)
    writer = open_generator(values)
    network = writer.network
    if len(network.depths) < 2:
        raise SettingsError(
            "the model has no exits before its last layer, so nothing speculates."
            " Give --depths, or train exits."
        )
    whole = encode_prompts(writer, texts, values.questions is not None, values.max_new_tokens)
    prompts = [prompt[-values.most_prompt_tokens :] for prompt in whole]
    draws = Draws(
        values.max_new_tokens, writer.end_ids, writer.tokenizer.decode, most_rows=values.most_rows
    )
    rows, wrong = [], []
    result = compare(network, prompts, values.num_tokens, values.seed, draws, "fp32")
    rows.append(comparison_row(f"fp32, {runner(network)}", result))
    ends = ", ".join(f"{name} {count:,}" for name, count in sorted(result.finishes.items()))
    strategies = ", ".join(
        f"{name} {count:,}" for name, count in sorted(result.by_strategy.items())
    )
    if result.differences:
        wrong.append(differing("fp32", result))
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
                    f"{strategy.name}: samples do not fit the distribution,"
                    f" chi-square {one.chi_square:.1f}, p {one.p:.2g}"
                )
        biased = fit(
            greedy_draft_pairs(network, prompts[0], depths[0], sampling, values.num_samples),
            expected,
        )
    others = [one for one in values.kinds if one != "int8" or network.is_native]
    for dtype in others if values.num_half_tokens else ():
        other = open_generator(argparse.Namespace(**{**vars(values), "dtype": dtype})).network
        result = compare(other, prompts, values.num_half_tokens, values.seed, draws, dtype)
        rows.append(comparison_row(f"{dtype}, {runner(other)}", result))
        if result.differences and other.is_native:
            wrong.append(differing(dtype, result))
    lines = [
        *page_head(
            f"{values.model.resolve().name}: speculation beside `full`",
            "whether every lossless strategy writes the text of the full model, token for token",
            "[Decoding](../decoding.md)",
        ),
        f"{network.num_layers} layers, exits at {', '.join(map(str, network.depths))}. Drawn"
        f" strategies ({strategies} tokens in fp32), batches of 1 to {values.most_rows}, limits,"
        f" stop sequences, 30 % sampled; texts ended by {ends}.",
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
        "*widest*: at the first token that differs (greedy texts), how far full's choice was ahead,"
        " over the largest logit; the largest of all differences. bf16 keeps 8 bits (4e-3), fp16 11"
        " (5e-4), fp32 24 (6e-8). The library's pass over several tokens equals its passes over"
        " one, so none of its kinds may differ.",
        "",
    ]
    if fits:
        lines += [
            "Pairs of tokens after one prompt, temperature 1, the 50 likeliest, against the"
            f" probabilities that transformers' model gives {len(expected):,} pairs (chi-square,"
            " pairs expected fewer than 5 times together):",
            "",
            *table(["strategy", "samples", "cells", "chi-square", "p"], fits),
            "The test detects errors: greedy drafts accepted as if they were samples, as S2D's"
            f" released code does, give chi-square {biased.chi_square:.1f},"
            f" p {f'{biased.p:.1g}' if biased.p else 'below 1e-300'}.",
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
