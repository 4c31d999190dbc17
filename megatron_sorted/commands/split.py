"""``megatron-sorted split``: the first samples are held out, the next are for choosing, the rest is trained on."""

from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.parser import Parser
from megatron_sorted.data.preparation.split import divide, read_samples, write_sets
from megatron_sorted.errors import DataError

DESCRIPTION = """\
Split a text, or JSON lines, without copies into held_out.jsonl, tuning.jsonl and train.jsonl.
--num-tokens adds train_TOKENS.jsonl: training samples, repeated until they hold so many tokens."""


def count_tokens(samples: Sequence[dict], tokenizer: Path) -> list[int]:
    """Return how many tokens each sample has, with the bos before it; prompts of instructions are encoded apart and counted too."""
    from megatron_sorted.data.preparation.templates import detect_format
    from megatron_sorted.evaluation.documents import Document, encode_documents
    from megatron_sorted.exported.tokenizer import open_tokenizer

    documents = [Document(sample, detect_format(sample)) for sample in samples]
    return [
        len(document.ids) for document in encode_documents(documents, open_tokenizer(tokenizer))
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, split and write; print how many there are."""
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
        help="text, or JSON lines or records; plain or gzipped",
    )
    parser.add_argument("--separator", metavar="TEXT", help="what stands between two texts")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write into"
    )
    parser.add_argument(
        "--num-held-out",
        type=int,
        default=0,
        metavar="N",
        help="samples that are held out (%(default)s)",
    )
    parser.add_argument(
        "--num-tuning",
        type=int,
        default=0,
        metavar="N",
        help="samples to choose learning rates by (%(default)s)",
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
        help="tokens of further training sets",
    )
    values = parser.parse_args(arguments)
    if values.num_tokens and values.tokenizer is None:
        raise DataError("--num-tokens: which tokens? Give --tokenizer.")
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
