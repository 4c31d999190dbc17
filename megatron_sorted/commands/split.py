"""``megatron-sorted split``: held-out samples first, then tuning samples, the rest for training."""

from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.parser import Parser
from megatron_sorted.data.preparation.split import divide, read_samples, write_sets
from megatron_sorted.errors import DataError

DESCRIPTION = """\
Split a text or JSON lines into held_out.jsonl, tuning.jsonl and train.jsonl, without duplicates.
--num-tokens adds train_TOKENS.jsonl: training samples, repeated up to that number of tokens."""


def count_tokens(samples: Sequence[dict], tokenizer: Path) -> list[int]:
    """Return the number of tokens of each sample, with its bos and its prompt if it has one."""
    from megatron_sorted.data.preparation.templates import detect_format
    from megatron_sorted.evaluation.documents import Document, encode_documents
    from megatron_sorted.exported.tokenizer import open_tokenizer

    documents = [Document(sample, detect_format(sample)) for sample in samples]
    return [
        len(document.ids) for document in encode_documents(documents, open_tokenizer(tokenizer))
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Split the samples, write the files and print the counts."""
    parser = Parser(
        "megatron-sorted split",
        DESCRIPTION,
        "megatron-sorted split --input stories.txt --separator '<|end|>' --output data "
        "--num-held-out 9",
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help="text, JSON lines or JSON records, plain or gzipped",
    )
    parser.add_argument("--separator", metavar="TEXT", help="text between two samples")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write into"
    )
    parser.add_argument(
        "--num-held-out",
        type=int,
        default=0,
        metavar="N",
        help="number of samples to hold out (default: %(default)s)",
    )
    parser.add_argument(
        "--num-tuning",
        type=int,
        default=0,
        metavar="N",
        help="number of samples for tuning (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="directory or sentencepiece file, to count tokens",
    )
    parser.add_argument(
        "--num-tokens",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="number of tokens of each further training set",
    )
    values = parser.parse_args(arguments)
    if values.num_tokens and values.tokenizer is None:
        raise DataError("--num-tokens: needs a tokenizer to count tokens. Give --tokenizer.")
    sizes_of = (
        None
        if values.tokenizer is None
        else lambda samples: count_tokens(samples, values.tokenizer)
    )
    samples = read_samples(values.input, values.separator)
    sets, facts = divide(
        samples, (values.num_held_out, values.num_tuning), values.num_tokens, sizes_of
    )
    write_sets(values.output, sets, facts, values.input)
    print(", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in facts.items()))
