"""Division of samples into sets: held out, to tune learning rates with, and to train on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sorted.data.preparation.templates import holds_records
from megatron_sorted.errors import DataError
from megatron_sorted.files import same_path, write_text_atomically
from megatron_sorted.reading.json_lines import read_records
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import read_text


def divide(
    samples: Sequence[dict],
    counts: tuple[int, int],
    num_tokens: Sequence[int] = (),
    sizes_of: Callable[[Sequence[dict]], list[int]] | None = None,
) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """Return the sets by name, and their sizes.

    Copies are dropped first, so that no sample is in two sets.

    Args:
        samples: All samples, in order.
        counts: The numbers of samples that are held out, and for tuning; the rest is trained on.
        num_tokens: Numbers of tokens; for each there is also a set of the training samples,
            repeated until they hold that many.
        sizes_of: A function that returns the number of tokens of each sample; None if tokens are
            not counted.

    Raises:
        DataError: Nothing would be left to train on, or it holds no token.
    """
    kept = drop_copies(samples)
    sets = split_samples(kept, *counts)
    facts = {"samples": len(samples), "copies_dropped": len(samples) - len(kept)} | {
        name: len(members) for name, members in sets.items()
    }
    if sizes_of is not None:
        sizes = {name: sizes_of(members) for name, members in sets.items()}
        facts |= {f"{name}_tokens": sum(size) for name, size in sizes.items()}
        sets |= {
            f"train_{number}": repeat_to(sets["train"], sizes["train"], number)
            for number in num_tokens
        }
    return sets, facts


def write_sets(
    folder: Path, sets: dict[str, list[dict]], facts: dict[str, int], source: Path
) -> None:
    """Write each set that holds samples as JSON lines, and the facts as split.json.

    Raises:
        DataError: The input file would be replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(same_path(source, folder / f"{name}.jsonl") for name in sets):
        raise DataError(
            f"--output: {source} would be replaced by a part of itself. Give another folder."
        )
    for name, members in sets.items():
        if members:
            lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in members)
            write_text_atomically(folder / f"{name}.jsonl", "".join(lines))
    write_text_atomically(folder / "split.json", json.dumps(facts, indent=2) + "\n")


def read_samples(path: Path, separator: str | None) -> list[dict]:
    """Return the samples: records of a JSON file, or the stripped texts between separators.

    Raises:
        DataError: The file cannot be read, or the separator is missing.
    """
    if holds_records(path):
        return [record for _, record in read_records(path)]
    text = read_text(path)
    if not separator:
        raise DataError(
            f"{shown(path)}: --separator is missing, so the file would be a single text. Give the "
            "text that separates two samples."
        )
    return [{"text": part.strip()} for part in text.split(separator) if part.strip()]


def drop_copies(samples: Sequence[dict]) -> list[dict]:
    """Return the samples without copies of earlier ones; white space and letter case are ignored.

    >>> drop_copies([{"text": "A b"}, {"text": "a  B"}])
    [{'text': 'A b'}]
    """
    seen: dict[str, dict] = {}
    for sample in samples:
        seen.setdefault(
            " ".join(
                json.dumps(sample, sort_keys=True, ensure_ascii=False)
                .replace("\\n", " ")
                .lower()
                .split()
            ),
            sample,
        )
    return list(seen.values())


def split_samples(
    samples: Sequence[dict], num_held_out: int, num_tuning: int
) -> dict[str, list[dict]]:
    """Return the three sets by name.

    Raises:
        DataError: Nothing would be left to train on.
    """
    if len(samples) <= num_held_out + num_tuning:
        raise DataError(
            f"--num-held-out, --num-tuning: {num_held_out} + {num_tuning} of {len(samples)} "
            "samples leave none to train on. Use less."
        )
    cut = num_held_out + num_tuning
    return {
        "held_out": list(samples[:num_held_out]),
        "tuning": list(samples[num_held_out:cut]),
        "train": list(samples[cut:]),
    }


def repeat_to(samples: Sequence[dict], sizes: Sequence[int], num_tokens: int) -> list[dict]:
    """Return the samples in order, repeated until they hold ``num_tokens`` or a little more.

    Args:
        samples: The samples.
        sizes: The number of tokens of each sample.
        num_tokens: The number of tokens to reach.

    Raises:
        DataError: The samples hold no token.
    """
    if not sum(sizes):
        raise DataError("--num-tokens: the training samples hold no token. Give another file.")
    chosen, total = [], 0
    while total < num_tokens:
        index = len(chosen) % len(samples)
        chosen.append(samples[index])
        total += sizes[index]
    return chosen
