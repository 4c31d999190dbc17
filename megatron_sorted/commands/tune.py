"""``megatron-sorted tune``: the fastest decoding options, kept in decoding.json beside the model.

All commands that decode read them from there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.benchmark.questions import read_prompts
from megatron_sorted.commands.options.decoding import (
    add_model_options,
    add_prompt_options,
    check_positive,
    check_prompt_options,
    open_generator,
)
from megatron_sorted.commands.options.engine import (
    add_engine_option,
    check_engine,
    given_options,
    split_line,
)
from megatron_sorted.commands.options.engine_tuning import (
    add_engine_tuning_options,
    check_engine_tuning,
    tune_drafts,
)
from megatron_sorted.commands.options.models import check_directories
from megatron_sorted.commands.parser import Parser
from megatron_sorted.decoding.tuning.tuned_options import TUNED_FILE, read_tuned_options
from megatron_sorted.errors import SettingsError

IF_STOPPED = "Nothing was written."
DESCRIPTION = """\
Find the fastest decoding options of a model on this machine: measure the quality and cost of every
exit, and store the best options of every strategy in decoding.json beside the model. With --engine
vllm, measure the steps of vLLM and store how many tokens an exit drafts there at each load."""
OF_ENGINE = (
    "model",
    "engine",
    "exit_layer",
    "num_draft_tokens",
    "max_num_seqs",
    "threads",
    "output",
)
"""Options that tuning inside another engine takes."""


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the values of the options."""
    parser = Parser(
        "megatron-sorted tune",
        DESCRIPTION,
        "megatron-sorted tune MODEL --prompt-file prompts.txt --least-same 0.99",
        usage="%(prog)s MODEL (--prompt-file FILE | --questions FILE | --engine vllm) [options]",
    )
    add_model_options(parser)
    add_prompt_options(parser, 16)
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=96,
        metavar="N",
        help="tokens to write for each prompt (default: %(default)s)",
    )
    group.add_argument(
        "--least-same",
        type=float,
        default=0.99,
        metavar="SHARE",
        help="least share of tokens early_exit has in common with full (default: %(default)s)",
    )
    group.add_argument(
        "--output", type=Path, metavar="FILE", help=f"file to write (default: MODEL/{TUNED_FILE})"
    )
    group = parser.add_argument_group("inside another engine; its own options follow --")
    add_engine_option(group, "what is tuned (default: %(default)s)")
    add_engine_tuning_options(group)
    line, own = split_line(arguments)
    values = parser.parse_args(line)
    values.own = own
    check_engine(values.engine, own)
    check_engine_tuning(values)
    if values.engine != "own":
        for name in given_options(parser, line):
            if name not in OF_ENGINE:
                raise SettingsError(
                    f"--{name.replace('_', '-')}: it has no effect with --engine {values.engine}. "
                    "Leave it out."
                )
        return values
    check_positive(values, "max_new_tokens", "num_prompts")
    check_prompt_options(values)
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the exits, choose and compare strategies, write the file."""
    values = read_arguments(arguments)
    check_directories(values.model, values.draft)
    path = values.output or values.model / TUNED_FILE
    read_tuned_options(path)  # refuses a damaged file before anything is measured
    if values.engine != "own":
        return tune_drafts(values, values.own, path)
    texts = read_prompts(values.prompt_file, values.questions, values.num_prompts)
    from megatron_sorted.benchmark.trials import encode_prompts
    from megatron_sorted.decoding.texts import Limits
    from megatron_sorted.decoding.tuning.tune import Tuning, depths_to_try

    generator = open_generator(values, as_tuned=False)
    print(generator.form.line, flush=True)
    depths = depths_to_try(generator)
    prompts = encode_prompts(generator, texts, values.questions is not None, values.max_new_tokens)
    limits = Limits(values.max_new_tokens, generator.end_ids)
    tuning = Tuning(generator, values.draft, depths, prompts, limits)
    tuning.choose(values.least_same)
    best = tuning.keep(path, {"device": values.device, "dtype": values.dtype})
    without = "without --draft" if generator.draft else "without drafts"
    note = f" (no strategy is faster: the model decodes {without})" if best == "full" else ""
    print(f"\nfastest lossless strategy: {best}{note}; written: {path}")
