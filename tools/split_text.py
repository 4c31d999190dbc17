"""Splits a text, or JSON lines, into samples that are held out, samples to choose learning rates by, and samples to train on.

    python tools/split_text.py --input stories.txt --separator '<|endoftext|>' --output data --num-held-out 200 \\
        --num-tuning 100 --tokenizer model_directory --num-tokens 1638400 307200

Copies are dropped first, so that no sample stands on two sides. The first samples are held out, the next are for choosing, the rest is
trained on: held_out.jsonl, tuning.jsonl, train.jsonl. For each of --num-tokens also train_TOKENS.jsonl: the training samples in their
order, from the beginning again when they are used up, until they hold that many tokens. It is what trains heads on as many tokens as a
model was trained on.
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.data.templates import holds_records
from megatron_sorted.errors import DataError
from megatron_sorted.files import same_path, write_text_atomically
from megatron_sorted.reading.json_lines import read_records
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import read_text


def read_samples(path: Path, separator: str | None) -> list[dict]:
    """Return the samples: records of a file of JSON, or texts between separators, without blanks around them.

    Raises:
        DataError: The file cannot be read, or there is nothing to separate texts.
    """
    if holds_records(path):
        return [record for _, record in read_records(path)]
    text = read_text(path)
    if not separator:
        raise DataError(f"{shown(path)}: --separator is missing, so it would be a single text. Say what stands between two texts.")
    return [{"text": piece.strip()} for piece in text.split(separator) if piece.strip()]


def drop_copies(samples: Sequence[dict]) -> list[dict]:
    """Returns the samples without those that equal an earlier one but for blanks and letter case."""
    seen: dict[str, dict] = {}
    for sample in samples:
        seen.setdefault(" ".join(json.dumps(sample, sort_keys=True, ensure_ascii=False).replace("\\n", " ").lower().split()), sample)
    return list(seen.values())


def split_samples(samples: Sequence[dict], num_held_out: int, num_tuning: int) -> dict[str, list[dict]]:
    """Returns the three sets by name.

    Raises:
        DataError: Nothing would be left to train on.
    """
    if len(samples) <= num_held_out + num_tuning:
        raise DataError(f"--num-held-out, --num-tuning: {num_held_out} + {num_tuning} of {len(samples)} samples leave none to train on. "
                        "Use less.")
    cut = num_held_out + num_tuning
    return {"held_out": list(samples[:num_held_out]), "tuning": list(samples[num_held_out:cut]), "train": list(samples[cut:])}


def repeat_to(samples: Sequence[dict], sizes: Sequence[int], num_tokens: int) -> list[dict]:
    """Returns the samples in order, again from the beginning when they are used up, until they hold ``num_tokens`` or a little more.

    Args:
        sizes: Tokens of each sample.

    Raises:
        DataError: The samples hold no token.
    """
    if not sum(sizes):
        raise DataError("--num-tokens: the training samples hold no token. Give another file.")
    chosen, total = [], 0
    while total < num_tokens:
        place = len(chosen) % len(samples)
        chosen.append(samples[place])
        total += sizes[place]
    return chosen


def count_tokens(samples: Sequence[dict], tokenizer: Path) -> list[int]:
    """Returns how many tokens each sample has, with the bos before it; prompts of instructions are encoded apart and counted too."""
    from megatron_sorted.data.templates import detect_format
    from megatron_sorted.evaluation.documents import Document, encode_documents
    from megatron_sorted.exported.tokenizer import open_tokenizer

    documents = [Document(sample, detect_format(sample)) for sample in samples]
    return [len(document.ids) for document in encode_documents(documents, open_tokenizer(tokenizer))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads, splits and writes; prints how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="text, or JSON lines or records; plain or gzipped")
    parser.add_argument("--separator", help="what stands between two texts")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--num-held-out", type=int, default=0)
    parser.add_argument("--num-tuning", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="directory or sentencepiece file, for --num-tokens")
    parser.add_argument("--num-tokens", nargs="+", type=int, default=[])
    values = parser.parse_args(arguments)
    if values.num_tokens and values.tokenizer is None:
        raise DataError("--num-tokens: which tokens? Give --tokenizer.")
    found = read_samples(values.input, values.separator)
    samples = drop_copies(found)
    sets = split_samples(samples, values.num_held_out, values.num_tuning)
    facts = {"samples": len(found), "copies_dropped": len(found) - len(samples)} | {name: len(chosen) for name, chosen in sets.items()}
    if values.tokenizer:
        sizes = {name: count_tokens(chosen, values.tokenizer) for name, chosen in sets.items()}
        facts |= {f"{name}_tokens": sum(size) for name, size in sizes.items()}
        sets |= {f"train_{number}": repeat_to(sets["train"], sizes["train"], number) for number in values.num_tokens}
    values.output.mkdir(parents=True, exist_ok=True)
    if any(same_path(values.input, values.output / f"{name}.jsonl") for name in sets):
        raise DataError(f"--output: {values.input} would be replaced by a part of itself. Give another folder.")
    for name, chosen in sets.items():
        if chosen:
            lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in chosen)
            write_text_atomically(values.output / f"{name}.jsonl", "".join(lines))
    write_text_atomically(values.output / "split.json", json.dumps(facts, indent=2) + "\n")
    print(", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in facts.items()))


if __name__ == "__main__":
    run_main(main)
