"""``megatron-sorted tune``: what is fastest is kept beside the model in decoding.json, where all commands that decode find it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.benchmark.questions import read_prompts
from megatron_sorted.commands.options.decoding import (
    add_model_options,
    add_prompt_options,
    check_positive,
    check_prompt_options,
    writer_of,
)
from megatron_sorted.commands.parser import Parser
from megatron_sorted.decoding.tuning.choices import CHOICES, read_choices

IF_STOPPED = "Nothing was written."
DESCRIPTION = """\
Choose how to decode a model on this machine: measure what each exit says and costs, and keep the
fastest options of every way in decoding.json beside the model."""


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = Parser(
        "megatron-sorted tune",
        DESCRIPTION,
        "megatron-sorted tune MODEL --prompt-file prompts.txt --least-same 0.99",
        usage="%(prog)s MODEL (--prompt-file FILE | --questions FILE) [options]",
    )
    add_model_options(parser)
    add_prompt_options(parser, 16)
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=96,
        metavar="N",
        help="written for each prompt (%(default)s)",
    )
    group.add_argument(
        "--least-same",
        type=float,
        default=0.99,
        metavar="SHARE",
        help="of tokens that early_exit has in common with full (%(default)s)",
    )
    group.add_argument(
        "--output", type=Path, metavar="FILE", help=f"file to write (default: MODEL/{CHOICES})"
    )
    values = parser.parse_args(arguments)
    check_positive(values, "max_new_tokens", "num_prompts")
    check_prompt_options(values)
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, choose, try and write."""
    values = read_arguments(arguments)
    path = values.output or values.model / CHOICES
    read_choices(path)  # what is damaged is told before anything is measured
    texts = read_prompts(values.prompt_file, values.questions, values.num_prompts)
    from megatron_sorted.benchmark.trials import encode_prompts
    from megatron_sorted.decoding.generate import Limits
    from megatron_sorted.decoding.tuning.tune import Tuning, depths_to_try

    writer = writer_of(values)
    print(writer.form.line, flush=True)
    depths = depths_to_try(writer)
    prompts = encode_prompts(writer, texts, values.questions is not None, values.max_new_tokens)
    tuning = Tuning(
        writer, values.draft, depths, prompts, Limits(values.max_new_tokens, writer.end_ids)
    )
    tuning.choose(values.least_same)
    best = tuning.keep(path, {"device": values.device, "dtype": values.dtype})
    slower = writer.draft and tuning.speed(best) <= tuning.speed("full")
    print(
        f"\nfastest without a difference: {best}{'; without --draft, full is faster here' if slower else ''}; written: {path}"
    )
