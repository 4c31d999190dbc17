"""The page of a study: gaps of every variant by depth, the front of static weights, and goals."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from lab.results.pages import page_head
from lab.results.recipe import shown
from lab.results.steps import Step
from lab.studies.outcomes import Outcomes, beyond, front, meets_goal
from lab.studies.picture import draw
from lab.studies.plan import StudyPlan
from lab.studies.variants import FAMILIES, VARIANTS, Variant
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reporting.markdown import facts, table


def write_page(
    name: str,
    title: tuple[str, str],
    plan: StudyPlan,
    outcomes: Outcomes,
    steps: Sequence[Step],
    docs: Path,
) -> tuple[Path, Path]:
    """Write page and picture; return their paths.

    ``title`` holds the title and the purpose of the page.
    """
    page, picture = docs / "results" / f"study_{name}.md", docs / "images" / f"study_{name}.png"
    draw(outcomes, title[0], picture)
    page.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        *page_head(f"{title[0]}: methods to weigh and train exits", title[1]),
        *_opening(plan, outcomes),
        *_gaps(outcomes),
        f"![All variants and the front of static weights]({os.path.relpath(picture, page.parent)})",
        "",
        *_findings(outcomes),
        *_gradients(plan, len(outcomes.separate)),
        *_losses(outcomes),
        *_recipe(plan, outcomes),
        *_commands(plan, steps),
    ]
    write_text_atomically(page, "\n".join(lines).rstrip() + "\n")
    return page, picture


def _opening(plan: StudyPlan, outcomes: Outcomes) -> list[str]:
    recipe, seeds = plan.recipe, len(outcomes.separate)
    columns = {"trained separately": outcomes.separate_loss}
    if outcomes.taught:
        columns["the same, taught by that of full depth"] = outcomes.taught_loss
    rows = [
        [str(depth), plan.rate(depth), *(str(loss(depth)).lstrip("+") for loss in columns.values())]
        for depth in outcomes.depths
    ]
    return [
        "Every method trains the same nested model (exits at"
        f" {', '.join(map(str, outcomes.depths))}) for {recipe.num_steps} steps of"
        f" {recipe.batch_size} x {recipe.seq_length} tokens of the same data, {seeds}"
        f" seed{'s' * (seeds > 1)}, rate {plan.rate(None)}. A depth's *gap* is its loss on held-out"
        " samples minus that of an ordinary model of this depth trained separately: the first"
        " layers of the same start, equal steps, equal data, a learning rate of its own. ± is the"
        " half width of a 95 % interval (Student's t over seeds, paired).",
        "",
        *table(["depth", "rate", *columns], rows),
    ]


def _front(outcomes: Outcomes) -> list[tuple[float, float]]:
    return front(
        [outcomes.point(name) for name in outcomes.nested if VARIANTS[name].family == "static"]
    )


def _gaps(outcomes: Outcomes) -> list[str]:
    line, last, lines = _front(outcomes), outcomes.depths[-1], []
    heads = [
        "method",
        *(f"gap @{depth}" for depth in outcomes.depths),
        "mean gap",
        "against uniform: mean",
        "full",
        "beyond the front",
    ]
    for family, title in FAMILIES.items():
        names = [name for name in outcomes.nested if VARIANTS[name].family == family]
        rows = []
        for name in names:
            far = beyond(outcomes.point(name), line)
            rows.append(
                [
                    VARIANTS[name].title,
                    *(f"{outcomes.gap(name, depth).value:+.3f}" for depth in outcomes.depths),
                    str(outcomes.mean_gap(name)),
                    str(outcomes.change(name)) if name != outcomes.uniform else "",
                    str(outcomes.change(name, [last])) if name != outcomes.uniform else "",
                    "outside" if far is None else f"{far:+.3f}" if family != "static" else "",
                ]
            )
        if rows:
            lines += [f"## {title}", "", *table(heads, rows)]
    return lines


def _findings(outcomes: Outcomes) -> list[str]:
    line, last, lines = _front(outcomes), outcomes.depths[-1], ["## What it shows", ""]
    same_steps = [name for name in outcomes.nested if VARIANTS[name].family != "longer"]
    for where, gap, full in (
        ("in the mean", outcomes.mean_gap, False),
        ("at full depth", outcomes.full_gap, True),
    ):
        if outcomes.closed(outcomes.uniform, full) is None:
            lines.append(
                f"- Uniform training has no gap {where} that could be closed:"
                f" {gap(outcomes.uniform)} nats."
            )
    good = {name: met for name in same_steps if (met := meets_goal(outcomes, name))}
    for name, met in good.items():
        lines.append(
            f"- **{VARIANTS[name].title}** closes {_share(outcomes, name, False)} of uniform's mean"
            f" gap and {_share(outcomes, name, True)} of its gap at full depth, outside the noise"
            f" of seeds: goal {' and goal '.join(repr(goal) for goal in met)} (a third of one, the"
            " other not worse)."
        )
    for name in outcomes.nested:
        if name not in same_steps:
            lines.append(
                f"- With the steps of a teacher spent otherwise, {VARIANTS[name].title}:"
                f" {_share(outcomes, name, False)} of uniform's mean gap closed,"
                f" {_share(outcomes, name, True)} of its gap at full depth."
            )
    if not good:
        lines.append(
            "- No method closes a third of uniform's gap without losing elsewhere, outside the"
            " noise of seeds."
        )
    far = {name: beyond(outcomes.point(name), line) for name in same_steps}
    ranked = sorted(
        (
            name
            for name, value in far.items()
            if value is not None and VARIANTS[name].family != "static"
        ),
        key=lambda name: -far[name],
    )
    lines.append(
        "- Farthest beyond the front of static weights (mean gap at the same full-depth gap): "
        + ", ".join(f"{VARIANTS[name].title} {far[name]:+.3f}" for name in ranked[:5])
        + "."
    )
    (x, y), points = line[0], {VARIANTS[name].title: outcomes.point(name) for name in same_steps}
    ahead = [title for title, (full, mean) in points.items() if full < x and mean < y]
    if ahead:
        lines.append(
            "- A smaller gap at full depth than any static weights, and a smaller mean gap than"
            f" those that come nearest: {', '.join(ahead)}."
        )
    helpless = [
        VARIANTS[name].title
        for name in outcomes.nested
        if name != outcomes.uniform
        and not outcomes.change(name).below_zero
        and not outcomes.change(name, [last]).below_zero
    ]
    if helpless:
        lines.append(
            "- No better than uniform, neither in the mean nor at full depth:"
            f" {', '.join(helpless)}."
        )
    return [*lines, ""]


def _gradients(plan: StudyPlan, seeds: int) -> list[str]:
    rows = [
        [str(depth), *(f"{number:.2f}" for number in numbers)]
        for depth, numbers in plan.gradients(seeds).items()
    ]
    return [
        "## Do exits pull against each other?",
        "",
        "Uniform training: the gradient of an exit's own loss against the one that comes "
        "from all deeper exits, where they meet. A cosine below 0 would be conflict.",
        "",
        *table(
            [
                "exit",
                "cosine, first step",
                "cosine, last step",
                "own norm / deeper norm, last step",
            ],
            rows,
        ),
    ]


def _share(outcomes: Outcomes, name: str, full: bool) -> str:
    share = outcomes.closed(name, full)
    return "nothing" if share is None else f"{100 * share:.0f} %"


def _losses(outcomes: Outcomes) -> list[str]:
    rows = [
        [
            VARIANTS[name].title,
            *(str(outcomes.loss(name, depth)).lstrip("+") for depth in outcomes.depths),
        ]
        for name in outcomes.nested
    ]
    return ["## Losses", "", *table(["method", *(f"@{depth}" for depth in outcomes.depths)], rows)]


def _recipe(plan: StudyPlan, outcomes: Outcomes) -> list[str]:
    rows = []
    for name in outcomes.nested:
        flags = [
            word.replace(str(plan.recipe.model), plan.recipe.model.name)
            for word in plan.flags(VARIANTS[name], 1)
        ]
        variant = VARIANTS[name]
        notes = f" (rate x {variant.rate:.3g})" * (variant.rate != 1)
        notes += f" ({variant.steps} x the steps)" * (variant.steps != 1)
        notes += " (starts from the separately trained model of full depth)" * variant.goes_on
        rows.append(f"| {variant.title} |{f' `{shlex.join(flags)}`' * bool(flags)}{notes} |")
    return ["## Flags", "", "| method | flags of pretrain_sorted.py |", "|---|---|", *rows, ""]


def _commands(plan: StudyPlan, steps: Sequence[Step]) -> list[str]:
    names = {
        "nested-uniform-1",
        f"separate-{plan.depths[0]}-1",
        *(step.name for step in plan.data_steps),
    }
    shown_steps = [step for step in steps if step.name in names]
    return [
        "## Commands",
        "",
        *facts(),
        "",
        "Data, one separate model and the uniform nested one; others differ in the flags above.",
        "",
        *(f"{shown(step, plan.recipe)}\n" for step in shown_steps),
    ]


def chosen(names: Sequence[str] | None) -> list[Variant]:
    """Return the variants of these names and uniform, in the table's order; all for None."""
    return [
        variant
        for variant in VARIANTS.values()
        if names is None or variant.name in names or variant.name == "uniform"
    ]
