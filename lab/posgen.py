"""PosGen, the benchmark of the Resonance RoPE paper: which positions can every exit read?

    python -m lab.posgen            three tasks, 3 seeds: trainings of half a minute each
    python -m lab.posgen --quick    next to no training: only shows that everything runs

A small nested model learns sequences of 64 numbers with plain and with rounded (resonance) rotary
frequencies, and is read at 256 numbers with these and with YaRN's. Writes docs/results/posgen.md,
posgen.json (a row for each task, seed, model, exit and bucket of positions) and
docs/images/posgen.png. Finished steps are not repeated: the same command continues where it was
stopped, and more seeds or tasks can be added.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
from collections.abc import Sequence

from lab.posgen_task.page import write_page
from lab.posgen_task.plan import TRAINED, PosGenPlan
from lab.posgen_task.sequences import TASKS, check_least
from lab.results.steps import Runner
from lab.results.tool import add_folder_options, open_folders, show_page


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_folder_options(parser, "runs/posgen/all", "task and kind of frequencies", 3)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="(all)")
    add("--steps", type=int, default=400, help="of a training, 32 sequences each (%(default)s)")
    add("--modulus", type=int, default=5, help="number of different numbers (%(default)s)")
    add("--jobs", type=int, default=1, help="trainings at a time, one core each (%(default)s)")
    values = parser.parse_args(arguments)
    values.part = "all"
    check_least(values, seeds=1, steps=2, jobs=1, modulus=3)
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    values = read_arguments(arguments)
    folder, inside, docs = open_folders(values, "posgen")
    plan = PosGenPlan(inside, tuple(values.tasks), values.seeds, values.steps, values.modulus)
    if values.quick:
        plan = PosGenPlan(inside, tuple(values.tasks), 1, 2, 5, 40, 4)
    of_a_seed = len(TRAINED) + 2
    runner = Runner(folder, len(plan.tasks) * (2 + plan.seeds * of_a_seed), values.jobs)
    for task in plan.tasks:
        for step in plan.data_steps(task):
            runner.run([step])
    for seed in range(1, plan.seeds + 1):
        pairs = [(task, trained) for task in plan.tasks for trained in TRAINED]
        runner.run([plan.train_step(*pair, seed) for pair in pairs])
        runner.run([plan.scale_step(task, seed) for task in plan.tasks])
        runner.run([plan.evaluate_step(task, seed) for task in plan.tasks])
    page, picture = write_page(plan, runner.steps, docs)
    show_page(page, picture, values.quick)


if __name__ == "__main__":
    run_main(main, "The same command again continues from what is unfinished.")
