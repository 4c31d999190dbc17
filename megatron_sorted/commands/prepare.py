"""``megatron-sorted prepare``: Megatron's indexed token files from JSON lines."""

import argparse
import sys
from collections.abc import Sequence

from megatron_sorted.commands.parser import Parser, at_least
from megatron_sorted.data.preparation.templates import FORMATS
from megatron_sorted.errors import SortedError
from megatron_sorted.reading.shown import printable
from megatron_sorted.text.prompt_form import parse_label

TOKENIZERS = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer")


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


def _template_label(text: str) -> str:
    if text != "auto":
        try:
            parse_label(text)
        except SortedError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return text


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the values of the options."""
    parser = Parser(
        "megatron-sorted prepare",
        "Turn JSON lines into Megatron's indexed token files. docs/data.md describes both.",
        "megatron-sorted prepare --input train.jsonl --output-prefix train --tokenizer-model t",
        usage="%(prog)s --input FILE ... --output-prefix P [options]",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="JSON lines, plain or gzipped"
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="P",
        help="write P_text_document.bin, P_text_document.idx and P.json",
    )
    parser.add_argument(
        "--tokenizer-type",
        default=TOKENIZERS[0],
        choices=TOKENIZERS,
        metavar="TYPE",
        help=", ".join(TOKENIZERS),  # the first is the default, and the line is full
    )
    parser.add_argument(
        "--tokenizer-model", metavar="PATH", help="sentencepiece file or Hugging Face directory"
    )
    parser.add_argument(
        "--vocab-size", type=at_least(1), metavar="N", help="vocabulary size of NullTokenizer"
    )
    parser.add_argument(
        "--train-tokenizer",
        type=at_least(1),
        metavar="N",
        help="first train P_tokenizer.model with N tokens on the input",
    )
    parser.add_argument(
        "--format",
        default="auto",
        choices=("auto", *FORMATS),
        metavar="NAME",
        help=f"{', '.join(FORMATS)} (default: by the first usable line)",
    )
    parser.add_argument(
        "--prompt-template",
        default="auto",
        type=_template_label,
        metavar="FORM",
        help="plain, alpaca, chat or chat:NAME (default: fits the format)",
    )
    parser.add_argument(
        "--seq-length",
        type=at_least(1),
        metavar="N",
        help="sequence length of training; longer samples are cut or skipped",
    )
    parser.add_argument(
        "--too-long",
        default="truncate",
        choices=("truncate", "skip"),
        metavar="WHAT",
        help="what to do with them: truncate or skip (default: %(default)s)",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end responses and texts with eos (default: yes)",
    )
    parser.add_argument(
        "--valid-fraction",
        type=_fraction,
        default=0.0,
        metavar="F",
        help="share written to P_valid_text_document (default: 0)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first line that cannot be used"
    )
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="read only the first N lines"
    )
    parser.add_argument(
        "--workers",
        type=at_least(1),
        default=1,
        metavar="N",
        help="number of processes, without effect on the output (default: 1)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    values = parser.parse_args(arguments)
    if values.train_tokenizer and values.tokenizer_model:
        parser.error("--train-tokenizer and --tokenizer-model exclude each other")
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files and print the counts."""
    values = read_arguments(arguments)
    from megatron_sorted.data.preparation.encode import EncodeOptions
    from megatron_sorted.data.preparation.prepare import PrepareOptions, prepare

    encode = EncodeOptions(
        tokenizer_type=values.tokenizer_type,
        tokenizer_model=values.tokenizer_model,
        vocab_size=values.vocab_size,
        data_format=values.format,
        prompt_template=values.prompt_template,
        seq_length=values.seq_length,
        too_long=values.too_long,
        append_eod=values.append_eod,
        valid_fraction=values.valid_fraction,
        strict=values.strict,
    )
    options = PrepareOptions(
        tuple(values.input),
        values.output_prefix,
        encode,
        values.train_tokenizer,
        values.workers,
        values.limit,
        values.overwrite,
    )
    summary = prepare(options)
    for line in summary.notes:
        print(f"note: {printable(line)}", file=sys.stderr)
    print(printable("\n".join(summary.lines())))
