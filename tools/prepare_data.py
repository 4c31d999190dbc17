"""Writes indexed token files from JSON lines: see docs/data.md.

Example: ``python tools/prepare_data.py --input train.jsonl.gz --output-prefix out/train --tokenizer-model tokenizer.model --workers 2``
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import sys

from megatron_sorted.data.encode import EncodeOptions
from megatron_sorted.data.prepare import PrepareOptions, prepare
from megatron_sorted.data.templates import FORMATS
from megatron_sorted.errors import SortedError
from megatron_sorted.reading.shown import printable
from megatron_sorted.text.prompt_form import parse_label


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


def _form(text: str) -> str:
    if text != "auto":
        try:
            parse_label(text)
        except SortedError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return text


def read_arguments(arguments: list[str] | None = None) -> PrepareOptions:
    """Returns the options given on the command line."""
    parser = argparse.ArgumentParser(description="Turn JSON lines into Megatron's indexed token files.")
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines, plain or gzipped")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P_text_document.bin/.idx and P.json")
    parser.add_argument("--tokenizer-type", default="SentencePieceTokenizer",
                        choices=("SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer"))
    parser.add_argument("--tokenizer-model", help="sentencepiece file or Hugging Face directory")
    parser.add_argument("--vocab-size", type=_positive, help="vocabulary of NullTokenizer")
    parser.add_argument("--train-tokenizer", type=_positive, metavar="VOCAB_SIZE",
                        help="first train a sentencepiece model of this size on the input and write it as P_tokenizer.model")
    parser.add_argument("--format", default="auto", choices=("auto", *FORMATS), help="default: by the fields of the first usable line")
    parser.add_argument("--prompt-template", default="auto", type=_form, metavar="FORM",
                        help="plain, alpaca, chat (the tokenizer's own template) or chat:NAME (one of several); default: chat for "
                             "messages where the tokenizer has a template, else plain")
    parser.add_argument("--seq-length", type=_positive, help="the --seq-length of training; longer samples are cut or skipped")
    parser.add_argument("--too-long", default="truncate", choices=("truncate", "skip"))
    parser.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True, help="end every response and text with eos")
    parser.add_argument("--valid-fraction", type=_fraction, default=0.0,
                        help="share written to P_valid_text_document, chosen by a hash of the text")
    parser.add_argument("--strict", action="store_true", help="stop at the first line that cannot be used")
    parser.add_argument("--limit", type=_positive, help="read only the first lines")
    parser.add_argument("--workers", type=_positive, default=1, help="processes; the output does not depend on it")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    args = parser.parse_args(arguments)
    if args.train_tokenizer and args.tokenizer_model:
        parser.error("--train-tokenizer and --tokenizer-model exclude each other")
    encode = EncodeOptions(
        tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model, vocab_size=args.vocab_size, data_format=args.format,
        prompt_template=args.prompt_template, seq_length=args.seq_length, too_long=args.too_long, append_eod=args.append_eod,
        valid_fraction=args.valid_fraction, strict=args.strict)
    return PrepareOptions(tuple(args.input), args.output_prefix, encode, args.train_tokenizer, args.workers, args.limit, args.overwrite)


def main() -> None:
    """Write the files and print what was counted."""
    summary = prepare(read_arguments())
    for line in summary.notes:
        print(f"note: {printable(line)}", file=sys.stderr)
    print(printable("\n".join(summary.lines())))


if __name__ == "__main__":
    run_main(main)
