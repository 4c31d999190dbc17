"""The page of one comparison."""

import os
from pathlib import Path

from lab.results.measured import NAMES, Numbers, read_numbers
from lab.results.pages import page_head
from lab.results.picture import ResultPanel, draw
from lab.results.rates import (
    choose_rate,
    chosen_rate,
    read_json,
    sweep_losses,
    trained_depths,
    trainer_losses,
)
from lab.results.recipe import HEADS, METHODS, Recipe, shown
from lab.results.steps import Step
from lab.results.tables import (
    answers_finding,
    differences_table,
    findings,
    measures_table,
    spread_table,
)
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reporting.markdown import facts

OPENINGS = {
    "stories": (
        "A really trained small language model, fine-tuned on stories",
        "what nested fine-tuning does to a really trained small LLaMA",
        """\
{model} is an ordinary LLaMA of {layers} layers, trained with a loss after its last layer only. It
was imported (`pretrain_sorted.py --load`), fine-tuned on {train:,} stories, exported to a Hugging
Face directory (`--save-hf`, verified against transformers) and measured there at every depth
(megatron-sorted evaluate), on {held_out:,} stories that were in no training here ({tokens:,}
tokens).""",
    ),
    "cldr": (
        "A model trained from scratch on facts, fine-tuned",
        "nested against ordinary training from nothing, on facts",
        """\
The ordinary model of the demo: {layers} layers, trained from scratch on {train:,} questions such as
"How do you say Monday in Finnish?" with a loss after its last layer only, exported to a Hugging
Face directory. From there it is fine-tuned on the same questions, exported again and measured at
every depth (megatron-sorted evaluate). *phrasing*: trained facts in wordings that are never
trained. *unseen*: facts that are never trained, so it shows what guessing achieves.""",
    ),
}
"""Comparison -> title, purpose and opening of its page."""
RATES_TRIED = (
    "Rates were tried at a few values, in shorter runs; other settings (warm-up, weight decay,"
    " batch) at none."
)
LIMITS = {
    "stories": [
        "One small model and one small set of stories. How much of it holds for large models is"
        " not shown here.",
        "The model's first training may have seen these very stories, held-out ones among them."
        " All methods start from it alike.",
        "Fine-tuning here continues in the domain of the first training, so ordinary fine-tuning"
        " has little to win.",
        RATES_TRIED,
    ],
    "cldr": [
        "A tiny model and a few hundred facts that need few layers; it shows what exits do, not"
        " what they do to a large model.",
        "Fine-tuning repeats the questions of the first training. What it adds at full depth is"
        " more training, not new data.",
        "Rates were chosen on questions in trained wordings, for all methods alike; on new wordings"
        " others may be better. Most of all for SFT+ICT, whose heads are very confident of wrong"
        " answers (loss on *unseen*).",
        RATES_TRIED,
    ],
}
"""Comparison -> what its page does not show."""


def write_page(
    part: str, recipe: Recipe, steps: list[Step], methods: tuple[str, ...], seeds: int, docs: Path
) -> tuple[Path, Path]:
    """Write page and picture; return their paths.

    Raises:
        DataError: A measured file is missing or damaged.
    """
    numbers = read_numbers(recipe, seeds)
    page, picture = (
        docs / "results" / f"{_page_name(part, recipe)}.md",
        docs / "images" / f"result_{part}.png",
    )
    draw(numbers, panels(part, recipe, numbers), picture)
    page.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        *_opening(part, recipe, numbers),
        *_measures(recipe, numbers),
        f"![Quality of every depth]({os.path.relpath(picture, page.parent)})",
        "",
        *_findings(part, recipe, numbers),
        *_recipe(recipe, numbers, methods, seeds),
        *_trainer(recipe, methods),
        "## Commands",
        "",
        *facts(),
        "",
        *(f"{shown(step, recipe)}\n" for step in steps),
    ]
    write_text_atomically(page, "\n".join(lines).rstrip() + "\n")
    return page, picture


def panels(part: str, recipe: Recipe, numbers: Numbers) -> list[ResultPanel]:
    """Return the panels of the picture: loss and, if there are questions, exact match.

    Without questions the second panel is the lower part of the first, enlarged.
    """
    text, first = numbers.names("texts")[0], recipe.exit_depths[0]
    whole = ResultPanel(
        "texts", text, "loss", "Loss of every depth (lower is better)", "nats per token"
    )
    if numbers.names("questions"):
        questions = numbers.names("questions")[0]
        return [
            whole,
            ResultPanel(
                "questions",
                questions,
                "exact_match",
                f"Exact match, {questions} (higher is better)",
                "questions answered right",
            ),
        ]
    top = 1.08 * max(
        numbers.number("texts", text, model, first, "loss").value for model in ("nested", HEADS)
    )
    return [
        whole,
        ResultPanel(
            "texts",
            text,
            "loss",
            f"The same from depth {first} on, enlarged",
            "nats per token",
            first,
            top,
        ),
    ]


def _page_name(part: str, recipe: Recipe) -> str:
    return recipe.model.name if part == "stories" else part


def _opening(part: str, recipe: Recipe, numbers: Numbers) -> list[str]:
    title, purpose, text = OPENINGS[part]
    split = read_json(recipe.folder / "data" / "split.json")
    measured = numbers.evaluations[0]["texts"][numbers.names("texts")[0]]
    opening = text.format(
        model=recipe.model.name,
        layers=numbers.depths[-1],
        train=split["train"],
        held_out=measured["documents"],
        tokens=measured["models"]["ordinary"]["tokens"],
    )
    return [*page_head(title, purpose), *opening.splitlines(), ""]


def _measures(recipe: Recipe, numbers: Numbers) -> list[str]:
    lines = []
    for kind, unit in (("texts", "nats per token"), ("questions", "exact match, greedy answers")):
        for name in numbers.names(kind):
            measured = numbers.evaluations[0][kind][name]
            size = (
                f"{measured['documents']:,} documents,"
                f" {measured['models']['ordinary']['tokens']:,} counted tokens"
                if kind == "texts"
                else f"{measured['questions']:,} questions"
            )
            lines += [
                f"## {name}: {unit}",
                "",
                f"{size}.",
                "",
                *measures_table(numbers, kind, name, recipe.exit_depths),
                "Differences, paired:",
                "",
                *differences_table(numbers, kind, name),
                *spread_table(numbers, kind, name),
            ]
    stars = [
        depth for depth in numbers.depths if depth not in (*recipe.exit_depths, numbers.depths[-1])
    ]
    note = (
        "± is one standard error over documents or questions. *before* is the model all methods"
        " start from; *SFT+ICT* the ordinarily fine-tuned model, frozen, with a norm and a head of"
        " its own trained for each depth. FLOPs: forward, share of the whole model."
    )
    if stars:
        note += (
            f" \\* no exit in nested training: depth {', '.join(map(str, stars))} is measured all"
            " the same."
        )
    return [*lines, note, ""]


def _findings(part: str, recipe: Recipe, numbers: Numbers) -> list[str]:
    seeds = len(numbers.evaluations)
    return [
        "## What it shows",
        "",
        *findings(numbers, numbers.names("texts")[0], recipe.exit_depths),
        *_finding_on_rates(recipe),
        *(answers_finding(numbers, name) for name in numbers.names("questions")),
        "",
        "## What it does not show",
        "",
        *(f"- {limit}" for limit in LIMITS[part]),
        f"- {'One seed' if seeds == 1 else f'{seeds} seeds'}: standard errors are over documents,"
        " and do not cover another training.",
        "",
    ]


def _finding_on_rates(recipe: Recipe) -> list[str]:
    """Return a line if another rate would have been better for nested training's last depth."""
    losses, last = sweep_losses(recipe, "nested"), recipe.measured[-1]
    taken = chosen_rate(recipe, "nested")
    if not losses or (best := choose_rate(losses, (last,))) == taken:
        return []
    first = recipe.exit_depths[0]
    return [
        "- **The learning rate moves along the same exchange.** Nested training has the rate that"
        f" is best for the mean of its exits. In the short runs {best} instead of {taken} gave"
        f" {losses[best][last] - losses[taken][last]:+.3f} at depth {last} and"
        f" {losses[best][first] - losses[taken][first]:+.3f} at depth {first}."
    ]


def _recipe(recipe: Recipe, numbers: Numbers, methods: tuple[str, ...], seeds: int) -> list[str]:
    split = read_json(recipe.folder / "data" / "split.json")
    heads = numbers.evaluations[0]["models"][HEADS]["trained_heads"]
    held_out = f"{split['held_out']:,} held out, " if split["held_out"] else ""
    lines = [
        "## Recipe",
        "",
        f"- Data: {split['samples']:,} samples, {split['copies_dropped']:,} copies dropped;"
        f" {held_out}{split['tuning']:,} to choose rates by, {split['train']:,} trained on"
        f" ({split['train_tokens']:,} tokens).",
        f"- Fine-tuning: {recipe.num_steps} steps of {recipe.batch_size} x {recipe.seq_length}"
        f" tokens, AdamW, cosine to 0 after {recipe.warmup} steps of warm-up; the same data, order"
        f" and seeds for every method ({seeds} seed{'s' * (seeds > 1)}).",
        f"- Nested: exits after {', '.join(map(str, recipe.exit_depths))} and {numbers.depths[-1]}"
        " layers, one norm and one head for all, mean of their losses. Ordinary: the same command"
        " with no loss before the last layer.",
        f"- SFT+ICT: {heads['num_new_parameters']:,} new parameters, {heads['num_tokens']:,}"
        f" trained tokens in {heads['num_steps']:,} steps (the ordinary fine-tuning before it not"
        " counted).",
        "- Learning rates: for each method the one with the least loss on the samples kept for"
        f" that, over the depths it trains, after {recipe.num_sweep_steps} steps:",
        "",
    ]
    for method in ("ordinary", "nested", "heads"):
        losses, depths = sweep_losses(recipe, method), trained_depths(recipe, method)
        tried = ", ".join(f"{rate}: {_mean_of(loss, depths)}" for rate, loss in losses.items())
        name = "SFT+ICT" if method == "heads" else METHODS[method]
        rates, taken = recipe.rates[method], chosen_rate(recipe, method)
        edge = (
            ""
            if not losses or taken not in (rates[0], rates[-1])
            else f", the {'largest' if taken == rates[-1] else 'smallest'} tried"
        )
        lines.append(f"  - {name}: {tried or 'not tried'}; taken: {taken}{edge}")
    if "nested-linear" in methods:
        lines.append("  - nested with linear weights: the rate of nested")
    return [*lines, ""]


def _mean_of(losses: dict[int, float], depths: tuple[int, ...]) -> str:
    """Return the mean over depths and, if there are several, each depth's loss in brackets.

    Rates move the losses of depths in different directions.
    """
    mean = f"{sum(losses[depth] for depth in depths) / len(depths):.3f}"
    return (
        mean
        if len(depths) == 1
        else f"{mean} ({' '.join(f'@{depth} {losses[depth]:.3f}' for depth in depths)})"
    )


def _trainer(recipe: Recipe, methods: tuple[str, ...]) -> list[str]:
    """Return the trainer's own losses of the first seed, for comparison with its logs.

    The trainer counts in packed windows.
    """
    name = recipe.held_out[0].name.removesuffix("_text_document")
    lines = [f"The trainer's own evaluation of *{name}* (packed windows, eos counted, seed 1):", ""]
    for method in methods:
        losses = trainer_losses(recipe.folder / "runs" / f"{method}-1" / "evaluation.json")
        listed = ", ".join(f"@{depth} {loss:.3f}" for depth, loss in sorted(losses.items()))
        lines.append(f"- {NAMES[method]}: {listed}")
    return [*lines, ""]
