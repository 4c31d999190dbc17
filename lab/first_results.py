"""Measure what nested fine-tuning does to a really trained ordinary model, at every depth.

    python -m lab.first_results stories --model DIRECTORY --text stories.txt --separator '<|end|>'
    python -m lab.first_results cldr

Compared are, from one ordinary model: ordinary fine-tuning, nested fine-tuning of equal length, and
SFT+ICT, heads of their own on the frozen layers of the ordinarily fine-tuned model, trained on as
many tokens. Each method's learning rate is chosen on samples kept for that. `cldr` makes its data
and its ordinary model itself, as lab/demo.py does. Writes a page into docs/results and its picture
into docs/images. Every step is a command that is shown; finished steps are not repeated. With
--quick: the same steps with next to no training.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
from collections.abc import Sequence
from pathlib import Path

from lab.results.experiments import cldr, stories
from lab.results.page import write_page
from lab.results.rates import chosen_rate
from lab.results.recipe import (
    METHODS,
    Recipe,
    evaluate_step,
    final_step,
    head_sweep_steps,
    sweep_steps,
)
from lab.results.steps import Runner, Step
from lab.results.tool import add_folder_options, open_folders, show_page
from megatron_sorted.errors import SettingsError


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, purpose in (
        ("stories", "a given model and a given text"),
        ("cldr", "the demo's questions, and a model trained on them"),
    ):
        part = parts.add_parser(name, help=purpose)
        add_folder_options(part, "runs/first_results/PART", "method", 1)
        part.add_argument(
            "--methods",
            nargs="+",
            choices=tuple(METHODS),
            default=["ordinary", "nested"],
            help="what is trained; ordinary always is (%(default)s)",
        )
        if name == "stories":
            part.add_argument(
                "--model",
                type=Path,
                required=True,
                help="Hugging Face directory with a sentencepiece tokenizer.model",
            )
            part.add_argument(
                "--text", type=Path, required=True, help="UTF-8 text of many documents"
            )
            part.add_argument(
                "--separator",
                default="<|endoftext|>",
                help="text between two documents (%(default)s)",
            )
            part.add_argument(
                "--num-held-out",
                type=int,
                default=200,
                help="documents to measure on, the first ones (%(default)s)",
            )
            part.add_argument(
                "--num-tuning",
                type=int,
                default=100,
                help="documents to choose rates by, the next ones (%(default)s)",
            )
    values = parser.parse_args(arguments)
    if values.seeds < 1:
        raise SettingsError(f"--seeds: {values.seeds} is not at least 1. Use 1 or more.")
    values.methods = [
        method for method in METHODS if method == "ordinary" or method in values.methods
    ]
    if "nested" not in values.methods:
        raise SettingsError("--methods: nested is missing, which is what this measures. Add it.")
    return values


def run_all(
    recipe: Recipe, data_steps: Sequence[Step], methods: tuple[str, ...], seeds: int, folder: Path
) -> list[Step]:
    """Run the steps that are not finished; return all.

    Data and rates come first, then all steps of one seed before the next seed.
    """
    tries, head_tries = sweep_steps(recipe), head_sweep_steps(recipe)
    runner = Runner(
        folder, len(data_steps) + len(tries) + len(head_tries) + seeds * (len(methods) + 1)
    )
    runner.run([*data_steps, *tries])
    rates = {
        method: chosen_rate(recipe, "ordinary" if method == "ordinary" else "nested")
        for method in methods
    }
    for seed in range(1, seeds + 1):
        runner.run([final_step(recipe, method, rates[method], seed) for method in methods])
        runner.run(head_tries if seed == 1 else [])
        runner.run([evaluate_step(recipe, methods, chosen_rate(recipe, "heads"), seed)])
    return runner.steps


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the steps and write the page."""
    values = read_arguments(arguments)
    folder, inside, docs = open_folders(values, "first_results")
    if values.part == "stories":
        recipe, steps = stories(
            inside,
            values.model.resolve(),
            values.text.resolve(),
            values.separator,
            (values.num_held_out, values.num_tuning),
            values.quick,
        )
    else:
        recipe, steps = cldr(inside, values.quick)
    done = run_all(recipe, steps, tuple(values.methods), values.seeds, folder)
    page, picture = write_page(values.part, recipe, done, tuple(values.methods), values.seeds, docs)
    show_page(page, picture, values.quick)


if __name__ == "__main__":
    run_main(main, "The same command again continues from what is unfinished.")
