"""``megatron-sorted generate``: one prompt, several at once, or a conversation.

Colours show the exit at which each token was written.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_sorted.commands.options.decoding import (
    add_generation_config,
    add_model_options,
    add_sampling_options,
    add_strategy_options,
    check_positive,
    default_sampling,
    open_generator,
    requested_strategy,
    sampling_of,
)
from megatron_sorted.commands.options.models import check_directories
from megatron_sorted.commands.parser import Parser
from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import decoded, read_text, split_lines

GIVE_PROMPTS = "Give --prompt-file a text in UTF-8, plain or gzipped."
DESCRIPTION = """\
Generate text with a nested model, or chat with it. The strategies self_speculative,
sorted_speculative and tree write the same text as full, faster; early_exit and fixed write other
texts. docs/decoding.md explains them."""


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the values of the options; prompts of a file are added to those of --prompt."""
    parser = Parser(
        "megatron-sorted generate",
        DESCRIPTION,
        'megatron-sorted generate MODEL --strategy tree --prompt "Once upon a time"',
        usage="%(prog)s MODEL (--prompt TEXT | --prompt-file FILE | --chat) [options]",
    )
    add_model_options(parser)
    group = parser.add_argument_group("texts")
    group.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="prompt to continue, or to answer (--prompt-template); may be repeated",
    )
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="file with a prompt on each line; - for standard input",
    )
    group.add_argument("--chat", action="store_true", help="conversation; an empty line ends it")
    group.add_argument(
        "--colour",
        choices=("auto", "always", "never"),
        default="auto",
        metavar="WHEN",
        help="colours for exits: auto (in terminals), always, never (default: %(default)s)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="most tokens to write (default: 128, or what the context leaves)",
    )
    group.add_argument(
        "--stop", nargs="+", default=[], metavar="TEXT", help="sequences that end a text"
    )
    add_strategy_options(parser)
    add_generation_config(add_sampling_options(parser))
    values = parser.parse_args(arguments)
    check_positive(values, "max_new_tokens", "threads")
    if values.prompt_file:
        values.prompt += [
            line for line in split_lines(read_prompt_text(values.prompt_file)) if line
        ]
    if bool(values.prompt) == values.chat:
        raise SettingsError(
            "Give --prompt, --prompt-file or --chat" + (", not both" if values.prompt else "") + "."
        )
    sampling_of(values)  # refuses a wrong number before the model is read
    return values


def read_prompt_text(path: str) -> str:
    """Return the text of a file of prompts, or of standard input for "-".

    Raises:
        DataError: The text cannot be read, or is not UTF-8.
    """
    return (
        decoded(sys.stdin.buffer.read(), "standard input")
        if path == "-"
        else read_text(path, GIVE_PROMPTS)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Complete the prompts, or chat."""
    values = read_arguments(arguments)
    check_directories(values.model, values.draft)
    from megatron_sorted.decoding.terminal import Console, TokenFormat

    generator = open_generator(values)
    network, draft, form = generator.network, generator.draft, generator.form.prompt_form
    sampling = sampling_of(values, default_sampling(values, generator, 0.0))
    strategy = requested_strategy(values).strategy(network, draft)
    depths = sorted({*network.depths, *(draft.depths if draft else ())})
    on_terminal = sys.stdout.isatty()
    page = TokenFormat(
        depths, values.colour == "always" or (values.colour == "auto" and on_terminal), on_terminal
    )
    exits = (
        f"exits at {', '.join(map(str, network.depths))}; "
        if len(network.depths) > 1
        else ""
        if draft
        else "no exits before the last layer, so only strategy full works (or give --depths); "
    )
    drafts = f"drafts by {shown(values.draft)}; " if draft else ""
    print(
        f"[{shown(values.model)}: {network.num_layers} layers, {exits}{drafts}"
        f"strategy: {strategy.name}] {page.legend()}",
        file=sys.stderr,
        flush=True,
    )
    in_template = values.chat or values.prompt_template is not None
    if in_template:
        print(f"[{generator.form.line}]", file=sys.stderr, flush=True)
    elif form is not None and form.is_conversation and generator.form.is_stored:
        print(
            f"[prompts are continued as plain text; --chat or --prompt-template {form.label} uses "
            "the prompt template of training]",
            file=sys.stderr,
            flush=True,
        )
    console = Console(generator, strategy, sampling, page, values.max_new_tokens, values.stop)
    if values.chat:
        console.chat()
    else:
        console.write(
            values.prompt,
            [
                generator.encode_chat([{"role": "user", "content": prompt}])
                if in_template
                else generator.encode(prompt)
                for prompt in values.prompt
            ],
        )
