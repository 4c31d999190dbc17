"""Page and picture of a comparison of ways to decode."""

import textwrap
from collections.abc import Sequence
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
from megatron_sorted.reporting.drawing import drawing
from megatron_sorted.reporting.markdown import facts, table

ALL = "all"
DEFINITIONS = (
    "*tokens/s*: new tokens over seconds, all questions of a group together, reading prompts included, batch 1.",
    "*speed-up*: tokens/s over those of `full` in the same run, question by question.",
    "*tokens a step*: new tokens over verifications by the full model, its own token included (Spec-Bench's mean accepted tokens).",
    "*accepted*: drafted tokens that are in the text over all drafted ones (of a tree: over all its nodes).",
    "*same*: answers that are `full`'s token for token.",
)


@dataclass(frozen=True)
class Terms:
    """On what terms ways are compared.

    Attributes:
        title: The page's title.
        sampling: How tokens are chosen.
        max_new_tokens: Tokens of a turn at most.
        numbers: Kind of numbers and device, in words.
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
    """Return {group: {way: score}}, all questions together under "all"."""
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
    writer: TextGenerator,
    questions: Sequence[MultiTurnQuestion],
    scores: dict[str, dict[str, Score]],
    options: Sequence[str],
    sections: Sequence[str],
) -> str:
    """Write the page, and return it.

    Args:
        path: The file.
        terms: What was alike for all ways.
        writer: The model.
        questions: What was asked.
        scores: What `scores_of` returned.
        options: Options of each way, in words.
        sections: Lines of what else was measured.
    """
    network, sampling = writer.network, terms.sampling
    chosen = (
        "greedy"
        if sampling.temperature == 0
        else (
            f"temperature {sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p}"
        )
    )
    if sampling.repetition_penalty != 1:
        chosen += f", repetition penalty {sampling.repetition_penalty:g}"
    lines = [
        f"# {terms.title}: ways to decode",
        "",
        f"{network.num_layers} layers, exits at {', '.join(map(str, network.depths))}; {terms.numbers}, "
        f"{torch.get_num_threads()} threads; {chosen}; {len(questions)} questions, at most {terms.max_new_tokens} tokens a turn.",
        "",
        *(f"- {option}" for option in options),
        "",
    ]
    for group, row in scores.items():
        count = sum(group in (ALL, question.group) for question in questions)
        rows = []
        for name, one in row.items():
            over = (
                f"{one.speed_up / row[HUGGING_FACE].speed_up:.2f}x" if HUGGING_FACE in row else ""
            )
            steps = f"{one.mean_accepted:.2f}" if one.mean_accepted else ""
            accepted = "" if one.acceptance is None else f"{one.acceptance:.0%}"
            rows.append(
                [
                    name,
                    f"{one.tokens_per_second:.1f}",
                    f"{one.speed_up:.2f}x",
                    over,
                    steps,
                    accepted,
                    f"{one.same:.0%}",
                ]
            )
        lines += [
            f"## {group} ({count} questions)",
            "",
            *table(
                [
                    "way",
                    "tokens/s",
                    "speed-up",
                    f"over {HUGGING_FACE}",
                    "tokens a step",
                    "accepted",
                    "same",
                ],
                rows,
            ),
        ]
    lines += [
        *sections,
        "## What the figures are",
        "",
        *(f"- {text}" for text in DEFINITIONS),
        "",
        *facts(f"{torch.get_num_threads()} threads, {terms.numbers}", ("torch", "transformers")),
        "",
    ]
    page = "\n".join(lines)
    write_text_atomically(path, page)
    return page


def draw(scores: dict[str, dict[str, Score]], title: str, path: Path) -> None:
    """Write a PNG: speed-up of each way by group, over transformers' plain generate where it took part, else over full."""
    from matplotlib import colormaps

    base, groups = HUGGING_FACE if HUGGING_FACE in scores[ALL] else FULL, list(scores)
    names = [name for name in scores[ALL] if name != base]
    width = 0.8 / max(len(names), 1)
    with drawing(path, title, 14, 6.5) as (figure, axes):
        for place, name in enumerate(names):
            values = [
                scores[group][name].speed_up / scores[group][base].speed_up for group in groups
            ]
            bars = axes.bar(
                [index + place * width for index in range(len(groups))],
                values,
                width,
                label=name,
                color=colormaps["tab10"](place % 10),
            )
            axes.bar_label(bars, fmt="%.2f", fontsize=8, rotation=90, padding=2)
        axes.axhline(1, color="#555555", linewidth=0.8, linestyle="--")
        axes.set_xticks(
            [index + width * (len(names) - 1) / 2 for index in range(len(groups))],
            [textwrap.fill(group, 16) for group in groups],
        )
        axes.set_ylabel(f"tokens/s over those of {base}, batch 1")
        axes.margins(y=0.1)
        figure.legend(frameon=False, ncols=4, loc="outside lower center")
