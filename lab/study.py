"""Compare methods to weigh and train exits: coefficients, schedules, gradient rules, distillation.

    python -m lab.study stories --model MODEL_DIRECTORY --text stories.txt
    python -m lab.study cldr
    python -m lab.study instructions --train train.jsonl.gz --valid valid.jsonl.gz

For each seed an ordinary model of each depth is trained separately, then the nested model with
every method, all on the same data for the same number of steps. Writes a page into docs/results:
the gap of every depth to its separate model, with confidence intervals, and a picture with the
front that static weights trace. Finished trainings are not repeated: the same command continues
where it was stopped, and more seeds or methods can be added. With --quick: next to no training.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
from collections.abc import Sequence
from pathlib import Path

from lab.results.steps import Runner
from lab.results.tool import add_folder_options, open_folders, show_page
from lab.studies.data_sets import plan_cldr, plan_instructions, plan_stories
from lab.studies.page import chosen, write_page
from lab.studies.plan import StudyPlan
from lab.studies.variants import VARIANTS
from megatron_sorted.errors import SettingsError

TITLES = {
    "stories": (
        "A small story model",
        "which weights, teachers and parts of exits close the gap, on stories",
    ),
    "cldr": ("A small model of facts", "which weights and teachers close the gap, on facts"),
    "instructions": (
        "A small model of instructions in many languages",
        "which weights, teachers and parts of exits close the gap, on instructions in 30 languages",
    ),
}
"""Data -> title and purpose of the page."""


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="DATA")
    for name in TITLES:
        part = parts.add_parser(name, help=TITLES[name][0])
        add_folder_options(part, "runs/study/DATA", "method", 3)
        part.add_argument(
            "--page",
            default=name,
            help="name of the page, study_PAGE.md, and of its picture (%(default)s)",
        )
        part.add_argument(
            "--variants",
            nargs="+",
            choices=tuple(VARIANTS),
            metavar="METHOD",
            help=f"what is trained; uniform always is (all: {', '.join(VARIANTS)})",
        )
        part.add_argument(
            "--teach-separate",
            action="store_true",
            help="train the separate models a second time, the full one teaching",
        )
        part.add_argument(
            "--jobs", type=int, default=1, help="trainings at a time, one core each (%(default)s)"
        )
        if name == "stories":
            part.add_argument(
                "--model",
                type=Path,
                required=True,
                help="Hugging Face directory with a sentencepiece tokenizer.model",
            )
            part.add_argument(
                "--text",
                type=Path,
                required=True,
                help="UTF-8 text of documents, <|endoftext|> between them",
            )
            part.add_argument(
                "--steps",
                type=int,
                default=400,
                help="steps of every training, of 8 samples (%(default)s)",
            )
            part.add_argument(
                "--seq-length", type=int, default=128, help="tokens of a sample (%(default)s)"
            )
        if name == "instructions":
            part.add_argument(
                "--train",
                type=Path,
                required=True,
                help="JSON lines with instruction, input and output, plain or gzipped",
            )
            part.add_argument("--valid", type=Path, required=True, help="the same, held out")
    values = parser.parse_args(arguments)
    for name in ("seeds", "jobs", "steps", "seq_length"):
        if getattr(values, name, 1) < 1:
            raise SettingsError(
                f"--{name.replace('_', '-')}: {getattr(values, name)} is not at least 1."
                " Use 1 or more."
            )
    return values


def run_all(plan: StudyPlan, values: argparse.Namespace, folder: Path) -> Runner:
    """Run what is not finished: data, rates, then all of one seed before the next seed."""
    variants, cuts, tries = chosen(values.variants), plan.extract_steps(), plan.rate_steps()
    of_a_seed = (1 + values.teach_separate) * len(plan.depths) + len(variants)
    runner = Runner(
        folder,
        len(plan.data_steps) + len(cuts) + len(tries) + values.seeds * of_a_seed,
        values.jobs,
    )
    for step in [*plan.data_steps, *cuts]:
        runner.run([step])  # each needs the one before
    runner.run(tries)
    for seed in range(1, values.seeds + 1):
        runner.run(plan.separate_steps(seed))
        taught = plan.taught_steps(seed) if values.teach_separate else []
        runner.run([*taught, *(plan.variant_step(variant, seed) for variant in variants)])
    return runner


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    values = read_arguments(arguments)
    folder, inside, docs = open_folders(values, "study")
    if values.part == "stories":
        plan = plan_stories(
            inside,
            values.model.resolve(),
            values.text.resolve(),
            values.quick,
            values.steps,
            values.seq_length,
        )
    elif values.part == "cldr":
        plan = plan_cldr(inside, values.quick)
    else:
        plan = plan_instructions(
            inside, values.train.resolve(), values.valid.resolve(), values.quick
        )
    runner = run_all(plan, values, folder)
    outcomes = plan.outcomes(
        chosen(values.variants), values.seeds, with_taught=values.teach_separate
    )
    page, picture = write_page(values.page, TITLES[values.part], plan, outcomes, runner.steps, docs)
    show_page(page, picture, values.quick)


if __name__ == "__main__":
    run_main(main, "The same command again continues from what is unfinished.")
