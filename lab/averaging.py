"""Measure what averaged weights change at every depth, against last weights and cosine decay.

    python -m lab.averaging stories --model MODEL_DIRECTORY --text stories.txt
    python -m lab.averaging instructions --train train.jsonl.gz --valid valid.jsonl.gz

For each seed an ordinary model of each depth is trained separately, then the nested model with each
schedule, and its last and averaged weights are evaluated. Writes docs/results/averaging.md and the
raw rows beside it; each data set is one part of both. Finished trainings are not repeated: the same
command continues where it was stopped. With --quick: next to no training.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
from collections.abc import Sequence
from pathlib import Path

from lab.results.steps import Runner
from lab.results.tool import add_folder_options, open_folders
from lab.studies.averaged import (
    RATES,
    VARIANTS,
    GivenRates,
    raw_rows,
    shown_commands,
    write_page,
    write_raw,
)
from lab.studies.data_sets import plan_instructions, plan_stories
from megatron_sorted.errors import SettingsError


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="DATA")
    inputs = {
        "stories": {
            "--model": "Hugging Face directory with a sentencepiece tokenizer.model",
            "--text": "UTF-8 text of documents, <|endoftext|> between them",
        },
        "instructions": {
            "--train": "JSON lines with instruction, input and output, plain or gzipped",
            "--valid": "the same, held out",
        },
    }
    for name, paths in inputs.items():
        part = parts.add_parser(name)
        add_folder_options(part, "runs/averaging/DATA", "model", 3)
        part.add_argument(
            "--steps", type=int, default=200, help="steps of every training (%(default)s)"
        )
        part.add_argument(
            "--jobs", type=int, default=1, help="trainings at a time, one core each (%(default)s)"
        )
        if name == "instructions":
            part.add_argument(
                "--original-steps",
                type=int,
                default=1000,
                help="steps of the ordinary model that all trainings start from (%(default)s)",
            )
        for flag, text in paths.items():
            part.add_argument(flag, type=Path, required=True, help=text)
    values = parser.parse_args(arguments)
    for name in ("seeds", "steps", "jobs", "original_steps"):
        if (number := getattr(values, name, 1)) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise SettingsError(f"{flag}: {number} is not at least 1. Use 1 or more.")
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    values = read_arguments(arguments)
    folder, inside, docs = open_folders(values, "averaging")
    if values.part == "stories":
        plan = plan_stories(inside, values.model.resolve(), values.text.resolve(), values.quick)
    else:
        plan = plan_instructions(
            inside,
            values.train.resolve(),
            values.valid.resolve(),
            values.quick,
            values.original_steps,
        )
    plan = GivenRates(plan, 12 if values.quick else values.steps, RATES[values.part])
    cuts = plan.extract_steps()
    of_a_seed = len(plan.depths) + len(VARIANTS)
    total = len(plan.data_steps) + len(cuts) + values.seeds * of_a_seed
    runner = Runner(folder, total, values.jobs)
    for step in [*plan.data_steps, *cuts]:
        runner.run([step])  # each needs the one before
    for seed in range(1, values.seeds + 1):
        runner.run(plan.separate_steps(seed))
        runner.run([plan.variant_step(variant, seed) for variant in VARIANTS])
    study = raw_rows(plan, values.seeds) | {"commands": shown_commands(plan, runner.steps)}
    raw = docs / "results" / "averaging.json"
    studies = write_raw(raw, values.part, study)
    write_page(raw.with_suffix(".md"), studies)
    print(f"written: {raw.with_suffix('.md')}, {raw}")


if __name__ == "__main__":
    run_main(main, "The same command again continues from what is unfinished.")
