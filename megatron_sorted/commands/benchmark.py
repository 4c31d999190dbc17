"""``megatron-sorted benchmark``: decoding strategies compared on the same questions.

Every strategy answers a question before the next one, so that a noisy machine is as noisy for all.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.benchmark.questions import GROUPS, read_questions, spread
from megatron_sorted.commands.options.decoding import (
    add_model_options,
    add_sampling_options,
    add_strategy_options,
    check_positive,
    open_generator,
    requested_strategy,
    sampling_of,
)
from megatron_sorted.commands.options.models import check_directories
from megatron_sorted.commands.parser import Parser
from megatron_sorted.decoding.strategies import STRATEGIES
from megatron_sorted.errors import SettingsError

IF_STOPPED = "Nothing was written."
DESCRIPTION = """\
Compare decoding strategies on questions in Spec-Bench's format, beside transformers' own generate.
Writes the answers, a page of scores and pictures; docs/decoding.md defines the numbers."""
DEFAULT_STRATEGIES = ("full", "self_speculative", "sorted_speculative", "tree", "early_exit")


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the values of the options."""
    parser = Parser(
        "megatron-sorted benchmark",
        DESCRIPTION,
        "megatron-sorted benchmark MODEL --questions questions.jsonl --per-group 10",
        usage="%(prog)s MODEL --questions FILE [options]",
    )
    add_model_options(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--questions",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines with question_id, category, turns",
    )
    group.add_argument(
        "--per-group",
        type=int,
        default=80,
        metavar="N",
        help="questions of each group, evenly spread (default: %(default)s)",
    )
    group.add_argument(
        "--strategies",
        nargs="+",
        choices=tuple(STRATEGIES),
        default=DEFAULT_STRATEGIES,
        metavar="NAME",
        help="strategies to compare (default: all but fixed)",
    )
    group.add_argument(
        "--without-transformers", action="store_true", help="leave out transformers' generate"
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="most tokens of each turn (default: %(default)s)",
    )
    group.add_argument(
        "--batches",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="also measure batches of N prompts",
    )
    group.add_argument(
        "--sweep",
        action="store_true",
        help="also try self_speculative at every exit and draft length",
    )
    group.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="also draw loss on these held-out texts over speed",
    )
    group.add_argument(
        "--text-separator", metavar="TEXT", help="separator of the texts in a plain file"
    )
    group.add_argument(
        "--num-texts",
        type=int,
        default=100,
        metavar="N",
        help="most texts of each file (default: %(default)s)",
    )
    group.add_argument(
        "--num-prompts",
        type=int,
        default=12,
        metavar="N",
        help="prompts of --batches, --sweep and --text (default: %(default)s)",
    )
    group.add_argument(
        "--output",
        type=Path,
        default=Path("runs/benchmark_decoding"),
        metavar="DIR",
        help="folder to write (default: %(default)s)",
    )
    group.add_argument("--title", help="title of the page (default: the model's directory)")
    add_strategy_options(parser)
    add_sampling_options(parser)
    values = parser.parse_args(arguments)
    if values.strategy is not None:
        raise SettingsError("--strategy: several strategies are compared. Use --strategies.")
    check_positive(values, "per_group", "max_new_tokens", "num_texts", "num_prompts")
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer the questions with every strategy, measure, and write the results."""
    values = read_arguments(arguments)
    questions = read_questions(values.questions)
    groups = dict.fromkeys([*GROUPS.values(), *(question.group for question in questions)])
    chosen = [
        question
        for group in groups
        for question in spread([one for one in questions if one.group == group], values.per_group)
    ]
    sampling = sampling_of(values)
    check_directories(values.model, values.draft)
    from megatron_sorted.benchmark.comparison import (
        Extras,
        compare_strategies,
        contestants_of,
        strategies_of,
    )
    from megatron_sorted.benchmark.scores import Terms

    generator = open_generator(values)
    print(generator.form.line, file=sys.stderr, flush=True)
    terms = Terms(
        values.title or values.model.resolve().name,
        sampling,
        values.max_new_tokens,
        f"{values.dtype} on {values.device}"
        + (" by the compiled library" if generator.network.is_native else ""),
    )
    strategies = strategies_of(generator, requested_strategy(values), values.strategies)
    contestants = contestants_of(generator, strategies, terms, not values.without_transformers)
    extras = Extras(
        values.batches,
        values.sweep,
        values.text or (),
        values.text_separator,
        values.num_texts,
        values.num_prompts,
    )
    print(
        compare_strategies(generator, chosen, strategies, contestants, terms, extras, values.output)
    )
    print(f"written: {values.output}/decoding.md, decoding.json, pictures and the answers")
