"""``megatron-sorted generate``: a prompt, several at once, or a conversation; colours show at which exit each token left."""

import argparse
import sys
from collections.abc import Sequence

from megatron_sorted.commands.options.decoding import (
    add_generation_config,
    add_model_options,
    add_sampling_options,
    add_strategy_options,
    check_positive,
    sampling_of,
    strategy_choice,
    usual_sampling,
    writer_of,
)
from megatron_sorted.commands.parser import Parser
from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import decoded, read_text, split_lines

GIVE_PROMPTS = "Give --prompt-file a text in UTF-8, plain or gzipped."
DESCRIPTION = """\
Write with a nested model, or chat with it. The ways full, self_speculative, sorted_speculative and
tree write the same text, faster; early_exit and fixed another. docs/decoding.md says how they work."""


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's values, the prompts of a file among them."""
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
        help="to go on with, or to answer (--prompt-template); may be repeated",
    )
    group.add_argument(
        "--prompt-file", metavar="FILE", help="a file whose lines are prompts; - for standard input"
    )
    group.add_argument("--chat", action="store_true", help="a conversation; an empty line ends it")
    group.add_argument(
        "--colour",
        choices=("auto", "always", "never"),
        default="auto",
        metavar="WHEN",
        help="auto (in terminals), always or never show where tokens left (%(default)s)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="at most (default: 128, or what the context leaves)",
    )
    group.add_argument(
        "--stop", nargs="+", default=[], metavar="WORD", help="words after which a text is over"
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
    sampling_of(values)  # a wrong number is told before the model is read
    return values


def read_prompt_text(path: str) -> str:
    """Return the text of a file of prompts, or of standard input for "-".

    Raises:
        DataError: It cannot be read, or is no UTF-8.
    """
    return (
        decoded(sys.stdin.buffer.read(), "standard input")
        if path == "-"
        else read_text(path, GIVE_PROMPTS)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what was asked for."""
    values = read_arguments(arguments)
    from megatron_sorted.decoding.terminal import Console, Page

    writer = writer_of(values)
    network, draft, form = writer.network, writer.draft, writer.form.prompt_form
    sampling = sampling_of(values, usual_sampling(values, writer, 0.0))
    strategy = strategy_choice(values).strategy(network, draft)
    depths = sorted({*network.depths, *(draft.depths if draft else ())})
    on_terminal = sys.stdout.isatty()
    page = Page(
        depths, values.colour == "always" or (values.colour == "auto" and on_terminal), on_terminal
    )
    exits = (
        f"exits at {', '.join(map(str, network.depths))}; "
        if len(network.depths) > 1
        else ""
        if draft
        else "no exits before the last layer, so only 'full' can be had (or --depths); "
    )
    drafts = f"drafts by {shown(values.draft)}; " if draft else ""
    print(
        f"[{shown(values.model)}: {network.num_layers} layers, {exits}{drafts}way: {strategy.name}] {page.legend()}",
        file=sys.stderr,
        flush=True,
    )
    asks = values.chat or values.prompt_template is not None
    if asks:
        print(f"[{writer.form.line}]", file=sys.stderr, flush=True)
    elif form is not None and form.is_conversation and writer.form.is_stored:
        print(
            f"[prompts are texts to go on with; --chat, or --prompt-template {form.label}, asks in the form that was trained]",
            file=sys.stderr,
            flush=True,
        )
    console = Console(writer, strategy, sampling, page, values.max_new_tokens, values.stop)
    if values.chat:
        console.chat()
    else:
        console.write(
            values.prompt,
            [
                writer.encode_chat([{"role": "user", "content": prompt}])
                if asks
                else writer.encode(prompt)
                for prompt in values.prompt
            ],
        )
