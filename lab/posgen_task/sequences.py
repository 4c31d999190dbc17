"""The sequences of PosGen, and the files that training and evaluation read.

    python -m lab.posgen_task.sequences --task cot --output runs/posgen/cot/data

PosGen (arXiv 2403.00071, section 5) asks for the next number of a sequence that follows from j = 1
number far back and the k = 3 numbers before it. What is computed is equally hard everywhere, so
that only positions are new in sequences longer than those of training. h is the sum of the four
numbers modulo M. The tasks differ in where the far number stands:

- recursive: right before the three others;
- cot (chain of thought): always at the beginning;
- semi_recursive: it moves one place every two numbers, so that its distance grows.

Each sequence begins with four random numbers, which are given. Train and test sequences have
different beginnings; a longer sequence continues a shorter one.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sorted.errors import SettingsError
from megatron_sorted.files import write_text_atomically

FAR, NEAR = 1, 3
"""j and k of the paper."""
GIVEN = FAR + NEAR
"""Numbers at the beginning of a sequence."""
TASKS: dict[str, Callable[[int], int]] = {
    "recursive": lambda place: place - GIVEN,
    "cot": lambda place: 0,
    "semi_recursive": lambda place: (place - GIVEN) // 2,
}
"""{task: function from the place of a number to that of its far number, both from 0}."""
BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"


def extend(task: str, given: Sequence[int], length: int, modulus: int) -> list[int]:
    """Return the sequence of a task that begins with these numbers.

    >>> extend("recursive", [1, 2, 3, 4], 7, 5)
    [1, 2, 3, 4, 0, 4, 1]
    >>> extend("cot", [1, 2, 3, 4], 7, 5)
    [1, 2, 3, 4, 0, 3, 3]
    >>> extend("semi_recursive", [1, 2, 3, 4], 7, 5)
    [1, 2, 3, 4, 0, 3, 4]
    """
    numbers, far = list(given), TASKS[task]
    while len(numbers) < length:
        place = len(numbers)
        numbers.append((numbers[far(place)] + sum(numbers[-NEAR:])) % modulus)
    return numbers


def draw_beginnings(counts: Sequence[int], modulus: int, seed: int) -> list[list[tuple[int, ...]]]:
    """Return as many beginnings for each set as it counts; no two of all of them are equal.

    Raises:
        SettingsError: There are fewer.
    """
    if sum(counts) > modulus**GIVEN:
        raise SettingsError(
            f"--train, --test: {sum(counts):,} sequences are more than the {modulus**GIVEN:,} "
            f"beginnings of {GIVEN} numbers below {modulus}. Use fewer, or a greater --modulus."
        )
    drawn = random.Random(seed).sample(range(modulus**GIVEN), sum(counts))
    digits = [
        tuple(number // modulus**place % modulus for place in range(GIVEN)) for number in drawn
    ]
    return [digits[sum(counts[:place]) : sum(counts[: place + 1])] for place in range(len(counts))]


def write_sequences(path: Path, sequences: Sequence[Sequence[int]]) -> None:
    """Write sequences as JSON lines: given numbers are the instruction, which is not trained."""
    lines = [
        json.dumps(
            {
                "instruction": " ".join(map(str, numbers[:GIVEN])),
                "output": " ".join(map(str, numbers[GIVEN:])),
            }
        )
        for numbers in sequences
    ]
    write_text_atomically(path, "\n".join(lines) + "\n")


def write_tokenizer(directory: Path, modulus: int) -> None:
    """Write a tokenizer directory with a token for each number, and bos before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = [UNKNOWN, BOS, EOS, *map(str, range(modulus))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary.index(BOS))]
    )
    tokenizer.add_special_tokens([UNKNOWN, BOS, EOS])
    directory.mkdir(parents=True, exist_ok=True)
    write_text_atomically(directory / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
    }
    write_text_atomically(
        directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n"
    )


def check_least(values: argparse.Namespace, **least: int) -> None:
    """Check that each named option is not below its least value.

    Raises:
        SettingsError: One is.
    """
    for name, value in least.items():
        if getattr(values, name) < value:
            raise SettingsError(
                f"--{name}: {getattr(values, name)} is not at least {value}. Use {value} or more."
            )


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), required=True)
    add("--output", type=Path, required=True, help="folder of train.jsonl, test.jsonl, tokenizer")
    add("--modulus", type=int, default=5, help="M, the number of different numbers (%(default)s)")
    add("--length", type=int, default=64, help="numbers of a training sequence (%(default)s)")
    add("--times", type=int, default=4, help="how many times longer test sequences are")
    add("--train", type=int, default=400, help="training sequences (%(default)s)")
    add("--test", type=int, default=200, help="test sequences (%(default)s)")
    add("--seed", type=int, default=0, help="of the beginnings (%(default)s)")
    values = parser.parse_args(arguments)
    check_least(values, modulus=2, length=GIVEN + 1, times=1, train=1, test=1)
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sequences and the tokenizer."""
    values = read_arguments(arguments)
    values.output.mkdir(parents=True, exist_ok=True)
    sets = draw_beginnings((values.train, values.test), values.modulus, values.seed)
    lengths = (values.length, values.length * values.times)
    for name, beginnings, length in zip(("train", "test"), sets, lengths, strict=True):
        sequences = [extend(values.task, given, length, values.modulus) for given in beginnings]
        write_sequences(values.output / f"{name}.jsonl", sequences)
    write_tokenizer(values.output / "tokenizer", values.modulus)


if __name__ == "__main__":
    run_main(main)
