"""The page of the proof."""

import textwrap
from collections.abc import Sequence
from typing import Any

from lab.contests.rounds import Row
from lab.contests.summary import names_of
from lab.results.pages import page_head
from lab.serving.rows import rows_of
from lab.vllm_proof.parts import (
    LEAST_P,
    MEMORY,
    PLAIN,
    PLUG_IN,
    SAMPLING,
    STOCK,
    TEMPERATURE,
    TOP_K,
)
from megatron_sorted.reporting.markdown import facts, table

HAPPENED = {
    "cached": "{} prompt tokens from the cache", "partial": "{} passes over a part of a prompt",
    "preempted": "{} preemptions", "stopped": "{} texts stopped", "aborted": "{} requests ended",
}  # fmt: skip
"""Count of a run -> how the table names it."""
HOW = (
    "Both engines of a row are started with the same arguments, in one process of vLLM's own "
    "Python; only the plug-in's own arguments differ. Texts are greedy and in float32, and are "
    "compared token by token; texts with stop strings as texts, since a draft may end behind the "
    "string.",
    "*as ours*: texts whose verifications drafted and accepted the same numbers of tokens as our "
    "own decoder's, one after another, with the same strategy on the same prompt and the first "
    "token (which vLLM chooses without a draft). Empty where the engine interrupts texts.",
    "*closest*: of the texts that differ, at the first token that differs, how far apart "
    "transformers holds the two tokens, over the largest logit (float32 keeps 6e-8).",
)


def text_rows(rows: Sequence[Row], runs: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of factors."""
    cells = []
    for name in names_of([row for row in rows if row["match"] not in (SAMPLING, MEMORY)]):
        own, run = rows_of(rows, match=name), runs[name]["other"]
        same = sum(row["place"] is None for row in own)
        drafted, accepted = (sum(row[key] for row in own) for key in ("drafted", "accepted"))
        compared = [row["as_ours"] for row in own if row["as_ours"] is not None]
        margins = [row["margin"] for row in own if row["margin"] is not None]
        happened = [text.format(run[key]) for key, text in HAPPENED.items() if run[key]]
        cells.append(
            [
                name, f"{sum(row['tokens'] for row in own):,}", f"{same} of {len(own)}",
                f"{accepted:,} of {drafted:,}" if drafted else "",
                f"{sum(compared)} of {len(compared)}" if compared else "",
                f"{run['most_running']}", ", ".join(happened),
                f"{max(margins):.1e}" if margins else "",
            ]
        )  # fmt: skip
    return cells


def sampling_lines(rows: Sequence[Row], version: str) -> list[str]:
    """Return the section on samples."""
    own = rows_of(rows, match=SAMPLING)
    if not own:
        return []
    cells = [
        [
            row["name"], f"{row['samples']:,}", f"{row['accepted']:,} of {row['drafted']:,}",
            str(row["impossible"]), str(row["cells"]),
            "" if row["chi_square"] is None else f"{row['chi_square']:.1f}", f"{row['p']:.3f}",
        ]
        for row in own
    ]  # fmt: skip
    lines = [
        "## Samples", "",
        *wrapped(
            "Pairs of the second and the third token after one prompt, temperature "
            f"{TEMPERATURE:g}, the {TOP_K} likeliest tokens, against the probabilities that "
            "transformers' own model gives them "
            "(chi-square; pairs expected fewer than 5 times together). *impossible*: pairs that "
            "have probability 0."
        ),
        *table(
            ["engine", "samples", "drafts accepted", "impossible", "cells", "chi-square", "p"],
            cells,
        ),
    ]  # fmt: skip
    if any(row["name"].startswith(STOCK) and row["p"] < LEAST_P for row in own):
        lines += wrapped(
            f"A fault of vLLM {version} itself, reproduced without the plug-in: on CPUs its own "
            "draft model samples wrongly at every temperature above 0 (temperature and top-k of "
            "drafted positions are memory that nothing has written; vllm issue 55005). The plug-in "
            "repairs it at its start."
        )
    return lines


def memory_lines(rows: Sequence[Row]) -> list[str]:
    """Return the section on bytes."""
    own = rows_of(rows, match=MEMORY)
    if not own:
        return []
    cells = [
        [
            row["name"], f"{row['weights']:,}", f"{row['keys_and_values']:,}",
            str(row["cached_layers"]), f"{row['blocks']:,}", f"{row['living']:,}",
        ]
        for row in own
    ]  # fmt: skip
    return [
        "## Bytes", "",
        *wrapped(
            "Memory that several tensors share counts once. *all tensors*: of the process, beyond "
            "those that it had before the engine started. (vLLM packs weights for oneDNN; here "
            "they stay tensors, so that they can be counted.)"
        ),
        *table(
            ["engine", "weights", "keys and values", "layers with a cache", "blocks",
             "all tensors"],
            cells,
        ),
    ]  # fmt: skip


def wrapped(text: str) -> list[str]:
    """Return a paragraph and an empty line."""
    return [*textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False), ""]


def page(rows: Sequence[Row], stored: dict[str, Any], settings: dict, command: str) -> str:
    """Return the page.

    Args:
        rows: All rows.
        stored: The store's facts.
        settings: The store's settings.
        command: The command that runs it again.
    """
    lines = page_head(
        f"{PLUG_IN} beside {PLAIN}",
        "whether the plug-in changes a text, and what it costs in memory",
        "[Other engines](../engines.md)",
    )
    texts = [row for row in rows if row["match"] not in (SAMPLING, MEMORY)]
    lines += [f"    {command}", ""]
    if texts:
        lines += [
            "## Texts", "",
            *table(
                ["setting", "tokens", "texts equal", "drafts accepted", "as ours", "most at once",
                 "what happened", "closest"],
                text_rows(rows, stored["runs"]),
            ),
        ]  # fmt: skip
        for text in HOW:
            lines += wrapped(text)
    lines += sampling_lines(rows, settings["vllm"])
    lines += memory_lines(rows)
    for name, why in stored.get("failed", {}).items():
        whose = ", a fault of its own that the plug-in repairs" * name.startswith(STOCK)
        lines += wrapped(f"{name} did not run{whose}: {why}")
    threads = settings["threads"]
    lines += [
        f"- model: {settings['model']}; vLLM {settings['vllm']}; new tokens of a text: "
        f"{settings['tokens']}",
        *facts(f"{threads} thread" + "s" * (threads > 1), ("torch", "transformers")),
        f"- run at commits: {', '.join(stored.get('commits', []))}",
        "- raw rows: [vllm_proof.json](vllm_proof.json)",
        "",
    ]
    return "\n".join(lines)
