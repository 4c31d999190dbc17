"""Writes with a nested model: a prompt, several at once, or a conversation in the terminal; colours show at which exit each token left.

    python tools/generate.py MODEL --prompt "Once upon a time"
    python tools/generate.py MODEL --way sorted_speculative --exit-layers 2 4 --thresholds 0.6 0.3 --prompt "Once" --prompt "Then"
    python tools/generate.py MODEL --chat

The ways full, self_speculative, sorted_speculative and tree write the same text, faster; early_exit and fixed another. docs/decoding.md
says how they work.
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import sys
import time
from collections.abc import Sequence

from decoding.options import (
    add_generation_config,
    add_model_options,
    add_sampling_options,
    add_way_options,
    check_positive,
    sampling_of,
    usual_sampling,
    way_of,
    writer_of,
)
from decoding.page import Page

from megatron_sorted.decoding.sampling import Sampling
from megatron_sorted.decoding.ways import Way
from megatron_sorted.decoding.writer import Writer
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import decoded, read_text, split_lines
from megatron_sorted.text.prompt_form import ALPACA, PLAIN

DEFAULT_TOKENS = 128
GIVE_PROMPTS = "Give --prompt-file a text in UTF-8, plain or gzipped."


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--prompt", action="append", default=[],
                        help="a text to go on with; several are written at once, as a batch; with --prompt-template a question that is "
                             "asked in this form")
    parser.add_argument("--prompt-file", metavar="FILE", help="a file whose lines are prompts; - for standard input")
    parser.add_argument("--chat", action="store_true", help="a conversation; an empty line ends it")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto",
                        help="colours show where tokens left (%(default)s: in terminals)")
    add_way_options(parser)
    add_sampling_options(parser)
    add_generation_config(parser)
    parser.add_argument("--max-new-tokens", type=int, help=f"at most so many (default: {DEFAULT_TOKENS}, or what the context leaves)")
    parser.add_argument("--stop", nargs="+", default=[], help="words after which a text is over")
    return parser.parse_args(arguments)


def read_prompt_text(path: str) -> str:
    """Return the text of a file of prompts, or of standard input for "-".

    Raises:
        DataError: It cannot be read, or is no UTF-8.
    """
    return decoded(sys.stdin.buffer.read(), "standard input") if path == "-" else read_text(path, GIVE_PROMPTS)


def new_tokens(writer: Writer, ids: list[list[int]], asked: int | None) -> int:
    """Return how many tokens are written at most; the default is cut to what the context leaves, with a word about it."""
    if asked is not None:
        return asked
    room = writer.network.max_positions - max(map(len, ids))
    if 1 <= room < DEFAULT_TOKENS:
        print(f"[the context of {writer.network.max_positions} tokens leaves room for {room} new ones, not {DEFAULT_TOKENS}]",
              file=sys.stderr, flush=True)
        return room
    return DEFAULT_TOKENS


def write(writer: Writer, prompts: list[str], ids: list[list[int]], way: Way, sampling: Sampling, values: argparse.Namespace,
          page: Page) -> list[str]:
    """Returns what was added to each prompt, after showing it and what it took."""
    began, texts, shown = time.perf_counter(), [""] * len(ids), [""] * len(ids)
    tokens = steps = drafted = accepted = 0
    by_depth: dict[int, int] = {}
    for piece in writer.write(ids, way, sampling, new_tokens(writer, ids, values.max_new_tokens), values.stop):
        texts[piece.row] += piece.text
        new = "".join(page.shown(*part) for part in piece.parts)
        shown[piece.row] += new
        if len(ids) == 1:
            print(new, end="", flush=True)
        tokens, steps = tokens + len(piece.added.tokens), steps + 1
        drafted, accepted = drafted + piece.added.num_drafted, accepted + piece.added.num_accepted
        for depth in piece.added.depths:
            by_depth[depth] = by_depth.get(depth, 0) + 1
        if piece.finish and len(ids) > 1:
            print(f"--- prompt {piece.row}: {prompts[piece.row]!r}\n{shown[piece.row]}", flush=True)
    took = time.perf_counter() - began
    spread = ", ".join(f"@{depth} {100 * count / tokens:.0f} %" for depth, count in sorted(by_depth.items()))
    line = f"{tokens} tokens in {took:.1f} s, {tokens / took:.1f} tokens/s; said by {spread}"
    if drafted:
        line += f"; {tokens / steps:.2f} tokens a verification, {100 * accepted / drafted:.0f} % of drafts accepted"
    print(("\n" if len(ids) == 1 else "") + f"[{way.name}: {line}]", file=sys.stderr, flush=True)
    return texts


def chat(writer: Writer, way: Way, sampling: Sampling, values: argparse.Namespace, page: Page) -> None:
    """A conversation until an empty line or the end of input."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("you> ").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: {error}. Write in UTF-8.") from error
        if not said:
            return
        messages.append({"role": "user", "content": said})
        try:
            [answer] = write(writer, [said], [writer.encode_chat(messages)], way, sampling, values, page)
        except DataError as error:
            print(f"error: {error} The conversation begins anew.", file=sys.stderr)
            messages.clear()
            continue
        form = writer.form.prompt_form  # a template puts its own blanks around an answer
        messages.append({"role": "assistant", "content": answer if form and form.name in (PLAIN, ALPACA) else answer.strip(" ")})


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes what was asked for."""
    values = read_arguments(arguments)
    prompts = list(values.prompt)
    check_positive(values, "max_new_tokens")
    if values.prompt_file:
        prompts += [line for line in split_lines(read_prompt_text(values.prompt_file)) if line]
    if bool(prompts) == values.chat:
        raise SettingsError("Give --prompt, --prompt-file or --chat" + (", not both" if prompts else "") + ".")
    sampling_of(values)  # a wrong number is told before the model is read
    writer = writer_of(values)
    sampling = sampling_of(values, usual_sampling(values, writer, 0.0))
    way = way_of(values, writer.network, writer.draft)
    depths = sorted({*writer.network.depths, *(writer.draft.depths if writer.draft else ())})
    page = Page(depths, values.colour == "always" or (values.colour == "auto" and sys.stdout.isatty()), sys.stdout.isatty())
    print(f"[{shown(values.model)}: {writer.network.num_layers} layers, "
          + (f"exits at {', '.join(map(str, writer.network.depths))}; " if len(writer.network.depths) > 1
             else "" if writer.draft else "no exits before the last layer, so only 'full' can be had (or --depths); ")
          + (f"drafts by {shown(values.draft)}; " if writer.draft else "") + f"way: {way.name}] {page.legend()}",
          file=sys.stderr, flush=True)
    asks = values.chat or values.prompt_template is not None
    form = writer.form.prompt_form
    if asks:
        print(f"[{writer.form.line}]", file=sys.stderr, flush=True)
    elif form is not None and form.is_conversation and writer.form.is_stored:
        print(f"[prompts are texts to go on with; --chat, or --prompt-template {form.label}, asks in the form that was trained]",
              file=sys.stderr, flush=True)
    if values.chat:
        chat(writer, way, sampling, values, page)
        return
    ids = [writer.encode_chat([{"role": "user", "content": prompt}]) if asks else writer.encode(prompt) for prompt in prompts]
    write(writer, prompts, ids, way, sampling, values, page)


if __name__ == "__main__":
    run_main(main)
