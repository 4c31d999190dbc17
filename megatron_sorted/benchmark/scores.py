"""The page and the picture of a comparison of decoding strategies."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sorted.benchmark.contest import ContestAnswer, Score, score
from megatron_sorted.benchmark.peer import HUGGING_FACE
from megatron_sorted.benchmark.questions import MultiTurnQuestion
from megatron_sorted.benchmark.trials import FULL
from megatron_sorted.decoding.strategies import SamplingParameters
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reporting.drawing import COLOURS, drawing
from megatron_sorted.reporting.markdown import facts, table

ALL = "all"
DEFINITIONS = (
    "*tokens/s*: new tokens over seconds, all questions of a group together, with the time for the "
    "prompts, batch 1.",
    "*speed-up*: ratio to the tokens/s of `full` in the same run, question by question.",
    "*tokens/step*: new tokens over verifications by the full model, its own token included "
    "(Spec-Bench's mean accepted tokens).",
    "*accepted*: share of drafted tokens that are in the text (of a tree: of all its nodes).",
    "*same*: share of answers that equal those of `full`, token for token.",
)
"""Definitions of the page's columns."""


@dataclass(frozen=True)
class Terms:
    """The terms of a comparison, the same for all contestants.

    Attributes:
        title: Title of the page.
        sampling: How tokens are chosen.
        max_new_tokens: Maximum number of new tokens of a turn.
        numbers: Data type and device as text.
    """

    title: str
    sampling: SamplingParameters
    max_new_tokens: int
    numbers: str


def scores_of(
    questions: Sequence[MultiTurnQuestion],
    answers: Sequence[dict[str, ContestAnswer]],
    names: Sequence[str],
) -> dict[str, dict[str, Score]]:
    """Return {group: {contestant: score}}, with all questions together under "all"."""
    groups = {ALL: list(answers)}
    for question, answer in zip(questions, answers, strict=True):
        groups.setdefault(question.group, []).append(answer)
    return {
        group: {name: score(members, name, FULL) for name in names}
        for group, members in groups.items()
    }


def write_page(
    path: Path,
    terms: Terms,
    generator: TextGenerator,
    questions: Sequence[MultiTurnQuestion],
    scores: dict[str, dict[str, Score]],
    options: Mapping[str, str],
    sections: Sequence[str],
) -> str:
    """Write the page and return it.

    Args:
        path: The file.
        terms: Terms of the comparison.
        generator: The model.
        questions: The questions.
        scores: Scores as `scores_of` returns them.
        options: Options of each strategy as text, by name.
        sections: Lines about other measurements.
    """
    network, sampling = generator.network, terms.sampling
    choice = "greedy"
    if sampling.temperature > 0:
        choice = (
            f"temperature {sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p}"
        )
    if sampling.repetition_penalty != 1:
        choice += f", repetition penalty {sampling.repetition_penalty:g}"
    lines = [
        f"# {terms.title}: decoding strategies",
        "",
        f"{network.num_layers} layers, exits at {', '.join(map(str, network.depths))}; "
        f"{terms.numbers}, {torch.get_num_threads()} threads; {choice}; "
        f"{len(questions)} questions, at most {terms.max_new_tokens} tokens per turn.",
        "",
        *(f"- `{name}`: {text or 'no options'}" for name, text in options.items()),
        "",
    ]
    columns = ["strategy", "tokens/s", "speed-up", f"over {HUGGING_FACE}"]
    columns += ["tokens/step", "accepted", "same"]
    for group, row in scores.items():
        count = sum(group in (ALL, question.group) for question in questions)
        base = row[HUGGING_FACE].speed_up if HUGGING_FACE in row else None
        rows = [
            [
                name,
                f"{one.tokens_per_second:.1f}",
                f"{one.speed_up:.2f}x",
                f"{one.speed_up / base:.2f}x" if base else "",
                f"{one.mean_accepted:.2f}" if one.mean_accepted else "",
                "" if one.acceptance is None else f"{one.acceptance:.0%}",
                f"{one.same:.0%}",
            ]
            for name, one in row.items()
        ]
        lines += [f"## {group} ({count} questions)", "", *table(columns, rows)]
    lines += [*sections, "## What the figures are", "", *(f"- {text}" for text in DEFINITIONS), ""]
    lines += facts(f"{torch.get_num_threads()} threads, {terms.numbers}", ("torch", "transformers"))
    page = "\n".join([*lines, ""])
    write_text_atomically(path, page)
    return page


def draw(scores: dict[str, dict[str, Score]], title: str, path: Path) -> None:
    """Write a PNG with the speed-up of each contestant by group.

    The base is transformers' plain generate if it took part, else full.
    """
    base, groups = HUGGING_FACE if HUGGING_FACE in scores[ALL] else FULL, list(scores)
    names = [name for name in scores[ALL] if name != base]
    width = 0.8 / max(len(names), 1)
    with drawing(path, title, 14, 6.5) as (figure, axes):
        for number, name in enumerate(names):
            values = [
                scores[group][name].speed_up / scores[group][base].speed_up for group in groups
            ]
            bars = axes.bar(
                [index + number * width for index in range(len(groups))],
                values,
                width,
                label=name,
                color=COLOURS[number % len(COLOURS)],
                hatch="//" * (number // len(COLOURS)),  # more contestants than colours
                edgecolor="white",
            )
            axes.bar_label(bars, fmt="%.2f", fontsize=8, rotation=90, padding=2)
        axes.axhline(1, color="#555555", linewidth=0.8, linestyle="--")
        axes.set_xticks(
            [index + width * (len(names) - 1) / 2 for index in range(len(groups))],
            [textwrap.fill(group, 16) for group in groups],
        )
        axes.set_ylabel(f"ratio to the tokens/s of {base}, batch 1")
        axes.margins(y=0.1)
        figure.legend(frameon=False, ncols=4, loc="outside lower center")
