"""The page of PosGen: accuracies of every exit, and whether the paper's order holds."""

import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from lab.posgen_task.outcomes import NAMES, Outcomes, as_records, read_rows
from lab.posgen_task.picture import draw
from lab.posgen_task.plan import LENGTH, NETWORK, TIMES, PosGenPlan
from lab.posgen_task.sequences import TASKS
from lab.results.pages import page_head
from lab.results.recipe import wrap_command
from lab.results.steps import Step
from lab.studies.outcomes import Estimate
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reporting.markdown import facts, table

PAPER = {
    "rope": (65.3, 69.6, 18.0),
    "resonance": (62.6, 75.3, 29.8),
    "rope + yarn": (95.9, 98.7, 33.7),
    "resonance + yarn": (98.3, 99.6, 48.5),
}
"""Accuracy beyond the training length in percent (arXiv 2403.00071), by task of PAPER_TASKS."""
PAPER_TASKS = ("recursive", "cot", "semi_recursive")
ORDER = (
    ("resonance", "rope"),
    ("rope + yarn", "rope"),
    ("resonance + yarn", "resonance"),
    ("resonance + yarn", "rope + yarn"),
    (f"resonance + yarn {LENGTH * TIMES}", f"rope + yarn {LENGTH * TIMES}"),
)
"""Pairs of which the first should be above the second."""
OPENING = f"""\
PosGen (arXiv 2403.00071) asks for the next number of a sequence, which is the sum, modulo M, of the
three numbers before it and of one number further back. *recursive*: that one stands right before
the three; *cot*: it is the first number of the sequence; *semi_recursive*: it moves one place every
two numbers. Every number is equally hard, so that only positions are new in longer sequences. The
model trains on sequences of {LENGTH} numbers and reads {LENGTH * TIMES}; accuracy is the share of
numbers that an exit finds most likely and that the rule gives, after the right ones before."""
READING = f"""\
*rope* and *resonance* are the frequencies in training: plain ones, and those whose wavelengths are
rounded to whole numbers. As in the paper's code, YaRN (factor {TIMES}, beta_fast 2) is applied only
where sequences are read. *+ yarn* counts a frequency's turns within the training length, as YaRN's
formula says; *+ yarn {LENGTH * TIMES}* within the longer one, as the paper's code does."""


def write_page(plan: PosGenPlan, steps: Sequence[Step], docs: Path) -> tuple[Path, Path]:
    """Write page, raw rows and picture; return the paths of page and picture.

    Raises:
        DataError: A file of measurements cannot be read.
    """
    rows = read_rows(plan)
    outcomes = Outcomes(rows)
    page, picture = docs / "results" / "posgen.md", docs / "images" / "posgen.png"
    draw(outcomes, picture)
    page.parent.mkdir(parents=True, exist_ok=True)
    records = ",\n".join(json.dumps(record) for record in as_records(rows))
    write_text_atomically(page.with_suffix(".json"), f"[\n{records}\n]\n")
    lines = [
        *page_head(
            "PosGen: positions beyond the training length",
            "which rotary frequencies let every exit read positions that it never saw",
            "[Longer contexts](../longer_contexts.md)",
        ),
        *_wrapped(OPENING),
        *_wrapped(READING),
        *_accuracies(outcomes),
        f"![Accuracy over the position]({os.path.relpath(picture, page.parent)})",
        "",
        *_order(outcomes),
        *_recipe(plan, steps, outcomes),
    ]
    write_text_atomically(page, "\n".join(lines).rstrip() + "\n")
    return page, picture


def _wrapped(text: str) -> list[str]:
    return [*textwrap.wrap(text, 110, break_on_hyphens=False), ""]


def _percent(value: Estimate) -> str:
    half = "" if value.half_width is None else f" ± {value.half_width:.1f}"
    return f"{value.value:.1f}{half}"


def _accuracies(outcomes: Outcomes) -> list[str]:
    """Return a table for each task."""
    lines = ["## Accuracies in percent", ""]
    lines += _wrapped(
        f"Within: the first {LENGTH} numbers. Beyond: the others. Means over {outcomes.num_seeds} "
        "seeds; ± is the half width of a 95 % interval (Student's t over seeds). Paper: beyond, at "
        "full depth, of a larger model with M = 17."
    )
    for task in outcomes.tasks:
        heads = [task]
        heads += [f"exit {depth}, within" for depth in outcomes.depths]
        heads += [f"exit {depth}, beyond" for depth in outcomes.depths]
        rows = []
        for name in NAMES:
            cells = [
                _percent(outcomes.accuracy(task, name, depth, beyond))
                for beyond in (False, True)
                for depth in outcomes.depths
            ]
            known = PAPER.get(name)
            paper = f"{known[PAPER_TASKS.index(task)]:.1f}" if known else ""
            rows.append([name, *cells, paper])
        lines += table([*heads, "paper"], rows)
    return lines


def _order(outcomes: Outcomes) -> list[str]:
    """Return the table of paired differences, each with what it says about the paper's order."""
    rows = []
    for above, below in ORDER:
        for task in outcomes.tasks:
            cells = []
            for depth in outcomes.depths:
                difference = outcomes.difference(task, above, below, depth)
                half = "" if difference.half_width is None else f" ± {difference.half_width:.1f}"
                cells += [f"{difference.value:+.1f}{half}", verdict(difference)]
            rows.append([f"{above} over {below}", task, *cells])
    heads = ["the paper's order", "task"]
    for depth in outcomes.depths:
        heads += [f"exit {depth}", "holds"]
    return [
        "## Does the paper's order hold?",
        "",
        *_wrapped(
            "Differences in points beyond the training length, paired by seed. *open*: the "
            "interval contains 0."
        ),
        *table(heads, rows),
    ]


def verdict(difference: Estimate) -> str:
    """Return whether a difference that should be above zero is.

    >>> [verdict(Estimate(5.0, half)) for half in (1.0, 6.0, None)], verdict(Estimate(-2.0, 1.0))
    (['yes', 'open', 'open'], 'no')
    """
    if difference.above_zero:
        return "yes"
    return "no" if difference.below_zero else "open"


def _recipe(plan: PosGenPlan, steps: Sequence[Step], outcomes: Outcomes) -> list[str]:
    name = f"{plan.tasks[0]}-rope-1"
    train = next(step for step in steps if step.name == f"train-{name}")
    measure = next(step for step in steps if step.name == f"evaluate-{plan.tasks[0]}-1")
    left_out = [task for task in TASKS if task not in plan.tasks]
    missing = f" Not measured: {', '.join(left_out)}." if left_out else ""
    return [
        "## Recipe",
        "",
        *_wrapped(
            f"M = {plan.modulus}; {plan.num_train:,} training and {plan.num_test:,} test sequences "
            f"with different beginnings, the same for all seeds. Network: `{NETWORK}`, "
            f"{plan.num_steps} steps of 32 sequences. The paper: M = 17, 2,380 beginnings "
            "shared by training and test, 10,000 sequences, 150 epochs, heads of 64 channels. Raw "
            f"rows: [posgen.json](posgen.json).{missing}"
        ),
        f"    python -m lab.posgen --tasks {' '.join(plan.tasks)} --seeds {plan.seeds}",
        "",
        "runs all of this; one training, and the measurement of a task and seed:",
        "",
        wrap_command(train.command),
        "",
        wrap_command(measure.command),
        "",
        *facts("1 thread each, shared, fp32"),
    ]
