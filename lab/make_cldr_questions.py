"""Write a closed-book question set in many languages from Unicode CLDR.

    python -m lab.make_cldr_questions --output runs/questions --num-samples 200000

Besides train.jsonl there are phrasing.jsonl, with trained facts in phrasings that are never
trained, and unseen.jsonl, with facts that are never trained: its score is what guessing achieves.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_sorted.errors import DataError
from megatron_sorted.files import write_text_atomically


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="directory the three files are written to"
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=None,
        help="samples of train.jsonl; default: all there are",
    )
    parser.add_argument(
        "--num-eval-samples",
        type=int,
        default=1000,
        help="at most this many samples in the two others",
    )
    parser.add_argument(
        "--locales", nargs="+", default=None, help="locales of the answers; default: 66 of them"
    )
    parser.add_argument(
        "--asking-locales",
        nargs="+",
        default=None,
        help="languages the questions are written in; default: 19 of them",
    )
    parser.add_argument("--kinds", nargs="+", default=None, help="kinds of questions; default: all")
    parser.add_argument("--max-facts", type=int, default=None, help="train at most this many facts")
    parser.add_argument(
        "--max-name-length",
        type=int,
        default=None,
        help="leave out facts with a longer name (characters)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1234,
        help="which facts come first, and the order of the samples",
    )
    values = parser.parse_args(arguments)
    for name in ("num_samples", "num_eval_samples", "max_facts", "max_name_length"):
        if (value := getattr(values, name)) is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')}: {value} is not positive. Use 1 or more.")
    return values


def write_samples(
    path: Path, samples: Iterable, total: int, order: random.Random | None = None
) -> list:
    """Write the samples as JSON lines, shuffled if ``order`` is given; return them."""
    written = list(tqdm(samples, desc=path.name, total=total, unit=" samples", disable=None))
    if order is not None:
        order.shuffle(written)
    assert len({(sample.instruction, sample.input) for sample in written}) == len(written), (
        "a question occurs twice"
    )
    write_text_atomically(
        path, "".join(json.dumps(sample.as_dict(), ensure_ascii=False) + "\n" for sample in written)
    )
    return written


def summary_table(sets: dict[str, list]) -> str:
    """Return a row for each file, and one for each kind of question in the first file."""

    def row(name: str, samples: list) -> str:
        counts = (
            len(samples),
            len({s.fact for s in samples}),
            len({s.language for s in samples}),
            len({s.kind for s in samples}),
        )
        return f"{name:<22}" + "".join(f"{count:>12,}" for count in counts)

    title = f"{'':<22}" + "".join(
        f"{word:>12}" for word in ("samples", "facts", "locales", "kinds")
    )
    first = next(iter(sets.values()))
    by_kind = {
        kind: [s for s in first if s.kind == kind] for kind in sorted({s.kind for s in first})
    }
    rule = "-" * len(title)
    files = [row(*item) for item in sets.items()]
    return "\n".join(
        [
            title,
            rule,
            *files,
            rule,
            *(row(f"  {kind}", of_kind) for kind, of_kind in by_kind.items()),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the three files and print a summary."""
    values = parse_arguments(arguments)
    try:
        import babel  # noqa: F401
    except ImportError as error:
        raise DataError(
            "Babel, which carries the CLDR data, is not installed. Install it: pip install Babel"
        ) from error
    from lab.cldr.facts import DEFAULT_LOCALES, KINDS
    from lab.cldr.questions import ASKING_LOCALES, plan_questions

    plan = plan_questions(
        tuple(values.locales or DEFAULT_LOCALES),
        tuple(values.asking_locales or ASKING_LOCALES),
        tuple(values.kinds or KINDS),
        seed=values.seed,
        max_facts=values.max_facts,
        max_name_length=values.max_name_length,
    )
    num_train = values.num_samples or plan.capacity()
    train = plan.train(num_train)
    values.output.mkdir(parents=True, exist_ok=True)
    sets = {
        "train.jsonl": write_samples(
            values.output / "train.jsonl", train, num_train, random.Random(values.seed)
        )
    }
    # The first round takes facts in order, so exactly these facts are trained.
    phrasing = plan.phrasing(min(num_train, len(plan.trained)), values.num_eval_samples)
    unseen = plan.never_trained(values.num_eval_samples)
    sets["phrasing.jsonl"] = write_samples(
        values.output / "phrasing.jsonl", phrasing, len(phrasing)
    )
    sets["unseen.jsonl"] = write_samples(values.output / "unseen.jsonl", unseen, len(unseen))
    print(f"\n{summary_table(sets)}\n\nwritten to {values.output}")


if __name__ == "__main__":
    run_main(main)
