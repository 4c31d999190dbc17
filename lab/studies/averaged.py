"""The study of averaged weights: its variants, its raw rows, and the page that shows them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.results.pages import page_head
from lab.results.rates import read_json, trainer_losses
from lab.results.recipe import shown
from lab.results.steps import ROOT, Step
from lab.studies.outcomes import Estimate, estimate
from lab.studies.plan import StudyPlan
from lab.studies.variants import Variant
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reporting.markdown import facts, table

AVERAGE = ("--average-weights-from", "0.5", "--evaluate-averaged")
CONSTANT = ("--lr-decay-style", "constant", *AVERAGE)
VARIANTS = tuple(
    Variant(name, "averaging", title, flags, rate)
    for name, title, flags, rate in (
        ("cosine", "cosine decay", AVERAGE, 1.0),
        ("cosine-third", "a third of the rate, cosine decay", AVERAGE, 1 / 3),
        ("constant", "constant rate", CONSTANT, 1.0),
        ("constant-third", "a third of the rate, constant", CONSTANT, 1 / 3),
        (
            "exponential",
            "constant rate, exponential average (0.98)",
            (*CONSTANT, "--average-weights-decay", "0.98"),
            1.0,
        ),
    )
)
"""Every run evaluates its last and averaged weights; others are compared with the first."""

SEEDS = 3  # below, a page is provisional
RATES = {
    "stories": {None: "3e-3", 2: "3e-3", 3: "3e-3", 4: "1e-3", 5: "1e-3"},
    "instructions": {None: "1e-3", 2: "3e-3", 4: "1e-3", 6: "1e-3", 8: "1e-3"},
}
"""Data -> {depth of a separate model, or None for nested ones: rate that lab.study chose}."""


class GivenRates(StudyPlan):
    """A study whose rates were chosen before, by the study of methods on the same data."""

    def __init__(self, plan: StudyPlan, num_steps: int, rates: dict[int | None, str]):
        recipe = replace(plan.recipe, num_steps=num_steps)
        super().__init__(recipe, plan.data_steps, plan.held_out, plan.tuning)
        self.rates = rates

    def rate(self, depth: int | None) -> str:
        """Return the rate of a separate model of this depth, or of nested training (None)."""
        return self.rates[depth]


def raw_rows(plan: StudyPlan, seeds: int) -> dict[str, Any]:
    """Return the losses on held-out samples of all trainings, as plain data for JSON.

    Raises:
        DataError: A training left no evaluation.
    """
    runs = ROOT / plan.recipe.folder / "runs"
    rows: list[dict[str, Any]] = []
    for seed in range(1, seeds + 1):
        for depth in plan.depths:
            path = runs / f"separate-{depth}-{seed}" / "evaluation.json"
            loss = trainer_losses(path, plan.held_out)[depth]
            rows.append({"run": "separate", "seed": seed, "depth": depth, "loss": loss})
        for variant in VARIANTS:
            record = read_json(runs / f"nested-{variant.name}-{seed}" / "evaluation.json")
            rows += [
                {
                    "run": variant.name,
                    "weights": weights,
                    "seed": seed,
                    "depth": depth,
                    "loss": record[key][plan.held_out][str(depth)]["loss"],
                }
                for weights, key in (("last", "sets"), ("averaged", "averaged"))
                for depth in plan.depths
            ]
    recipe = plan.recipe
    return {
        "steps": recipe.num_steps,
        "tokens_a_step": recipe.batch_size * recipe.seq_length,
        "rate": plan.rate(None),
        "facts": facts(),
        "rows": rows,
    }


def _losses(rows: Sequence[dict], run: str, weights: str | None, depth: int) -> list[float]:
    """Return the loss of each seed, in order."""
    chosen = [
        row
        for row in rows
        if (row["run"], row.get("weights"), row["depth"]) == (run, weights, depth)
    ]
    return [row["loss"] for row in sorted(chosen, key=lambda row: row["seed"])]


def _difference(rows: Sequence[dict], one: tuple, other: tuple, depth: int) -> Estimate:
    """Return the mean difference of losses of two (run, weights) over seeds, paired."""
    pairs = zip(_losses(rows, *one, depth), _losses(rows, *other, depth), strict=True)
    return estimate([a - b for a, b in pairs])


def _variants(study: dict[str, Any]) -> list[Variant]:
    """Return the variants that a file of raw rows holds; older files lack later ones."""
    return [v for v in VARIANTS if any(row["run"] == v.name for row in study["rows"])]


def findings(study: dict[str, Any]) -> list[str]:
    """Return a sentence for each variant and comparison: where the average has the lower loss."""
    rows = study["rows"]
    depths = sorted({row["depth"] for row in rows})
    lines = []
    for variant in _variants(study):
        compared = [("its own last weights", (variant.name, "last"))]
        if variant is not VARIANTS[0]:
            compared.append(("the last weights of cosine decay", (VARIANTS[0].name, "last")))
        for title, other in compared:
            by_kind: dict[str, list[str]] = {"lower": [], "higher": [], "undecided": []}
            for depth in depths:
                change = _difference(rows, (variant.name, "averaged"), other, depth)
                kind = "lower" if change.below_zero else "undecided"
                by_kind["higher" if change.above_zero else kind].append(f"@{depth}")
            shown_depths = "; ".join(f"{kind} {' '.join(at)}" for kind, at in by_kind.items() if at)
            lines.append(f"- {variant.title}: the average's loss against {title}: {shown_depths}.")
    return lines


def gap_tables(study: dict[str, Any]) -> list[str]:
    """Return the tables of one data set: gaps at every depth, and what averaging changed."""
    rows = study["rows"]
    depths = sorted({row["depth"] for row in rows})
    heads = [f"@{depth}" for depth in depths]
    kinds = [
        (variant.title, (variant.name, weights))
        for variant in _variants(study)
        for weights in ("last", "averaged")
    ]
    gaps = [
        [
            f"{title}: {run[1]} weights",
            *(str(_difference(rows, run, ("separate", None), depth)) for depth in depths),
        ]
        for title, run in kinds
    ]
    changes = [
        [
            f"{variant.title}: averaged - last",
            *(
                str(_difference(rows, (variant.name, "averaged"), (variant.name, "last"), depth))
                for depth in depths
            ),
        ]
        for variant in _variants(study)
    ] + [
        [
            f"{title}: {run[1]} - cosine decay: last",
            *(str(_difference(rows, run, (VARIANTS[0].name, "last"), depth)) for depth in depths),
        ]
        for title, run in kinds[2:]
    ]
    alone = [str(estimate(_losses(rows, "separate", None, depth))).lstrip("+") for depth in depths]
    return [
        *table(["loss, nats a token", *heads], [["trained separately", *alone]]),
        *table(["gap to that", *heads], gaps),
        *table(["difference of losses, paired by seed", *heads], changes),
    ]


def _findings_lines(study: dict[str, Any]) -> list[str]:
    opening = "Outside the noise of seeds (a 95 % interval that does not hold 0):"
    return [opening, "", *findings(study), ""]


def write_raw(path: Path, name: str, study: dict[str, Any]) -> dict[str, Any]:
    """Write one data set's rows into the file of all, and return what it holds then."""
    studies = read_json(path) if path.exists() else {}
    studies = dict(sorted({**studies, name: study}.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(studies, indent=1) + "\n")
    return studies


def write_page(path: Path, studies: dict[str, Any]) -> None:
    """Write the page of all data sets from their raw rows."""
    lines = page_head(
        "Averaged weights",
        "what averaging the weights of a run changes at every depth",
        "[Averaged weights](../averaging.md)",
    )
    lines += [
        "A nested model (uniform coefficients) is fine-tuned with a cosine decay to 0, and with "
        "a constant learning rate after the same warm-up, for the same steps on the same data. "
        "Every run evaluates its last weights and the average over the second half of its steps "
        "(every step). A depth's *gap* is its loss on held-out samples minus that of an ordinary "
        "model of this depth trained separately with cosine decay. ± is the half width of a 95 % "
        "interval (Student's t over seeds, paired). Raw rows: `averaging.json` beside this page.",
        "",
    ]
    for name, study in studies.items():
        seeds = len({row["seed"] for row in study["rows"]})
        lines += [
            f"## {name.capitalize()}",
            "",
            *[f"**Provisional: {seeds} of {SEEDS} seeds are finished.**", ""] * (seeds < SEEDS),
            f"{study['steps']} steps of {study['tokens_a_step']:,} tokens, {seeds} "
            f"seed{'s' * (seeds > 1)}, rate "
            f"{study['rate']} (chosen by the [study of methods](study_{name}.md), with cosine "
            "decay).",
            "",
            *gap_tables(study),
            *(_findings_lines(study) if seeds > 1 else []),
            *study["facts"],
            "",
            *study["commands"],
            "",
        ]
    write_text_atomically(path, "\n".join(lines).rstrip() + "\n")


def shown_commands(plan: StudyPlan, steps: Sequence[Step]) -> list[str]:
    """Return the commands of seed 1 that differ in their flags, as the page shows them."""
    names = {"nested-cosine-1", "nested-constant-1"}
    return [f"{shown(step, plan.recipe)}\n" for step in steps if step.name in names]
