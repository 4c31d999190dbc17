"""The page about llama.cpp with a sub-model that drafts."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.llama_cpp.turns import DRAFT, PLAIN, Files, Row
from lab.results.pages import page_head
from megatron_sorted.llama_cpp.draft_settings import DraftSettings
from megatron_sorted.llama_cpp.next_tokens import Agreement
from megatron_sorted.reporting.markdown import facts, table


def speed_of(row: Row) -> float:
    """Return the new tokens a second of a turn, by the server's own clock, without prompts."""
    return row["tokens"] / row["seconds"]


def spread(values: Sequence[float], digits: int) -> str:
    """Return median, least and largest value.

    >>> spread([3.0, 1.0, 2.0], 1)
    '2.0 (1.0 to 3.0)'
    """
    least, most = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def gains(rows: Sequence[Row], kind: str) -> list[float]:
    """Return, for each round, the speed with the draft over that without it."""
    by_round: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == kind:
            by_round.setdefault(row["round"], {})[row["strategy"]] = speed_of(row)
    return [pair[DRAFT] / pair[PLAIN] for pair in by_round.values() if len(pair) == 2]


def speed_table(rows: Sequence[Row], kinds: Sequence[str]) -> list[str]:
    """Return the table of speeds."""
    lines = []
    for kind in kinds:
        of_kind = [row for row in rows if row["kind"] == kind]
        plain, draft = (
            [row for row in of_kind if row["strategy"] == name] for name in (PLAIN, DRAFT)
        )
        drafted, accepted = (sum(row[name] for row in draft) for name in ("drafted", "accepted"))
        lines.append(
            [
                kind,
                spread([speed_of(row) for row in plain], 1),
                spread([speed_of(row) for row in draft], 1),
                spread(gains(rows, kind), 2),
                f"{100 * accepted / max(1, drafted):.1f} %",
                f"{draft[-1]['same']} of {draft[-1]['texts']}",
            ]
        )
    heads = ["type", "alone, tokens/s", "with the draft", "ratio in a round", "accepted"]
    return table([*heads, "texts equal"], lines)


def file_table(
    files: Files, kinds: Sequence[str], draft: DraftSettings, agreements: Mapping[str, Agreement]
) -> list[str]:
    """Return the table of file sizes and of next tokens."""
    lines = []
    for kind in kinds:
        sizes = [
            f"{files.path(depth, kind).stat().st_size / 1e6:.1f}"
            for depth in (files.num_layers, draft.depth)
        ]
        one = agreements[kind]
        share = 100 * one.num_same / max(1, one.num_tokens)
        largest = max((two.margin for two in one.differences), default=0.0)
        median = statistics.median([two.margin for two in one.differences] or [0.0])
        lines.append(
            [kind, *sizes, f"{one.num_same} of {one.num_tokens} ({share:.1f} %)",
             f"{median:.2g}, {largest:.2g}"]
        )  # fmt: skip
    heads = ["type", "full model, MB", f"first {draft.depth} layers, MB", "transformers' tokens"]
    return table([*heads, "margins of the others: median, largest"], lines)


def page(
    rows: Sequence[Row], files: Files, kinds: Sequence[str], draft: DraftSettings,
    agreements: Mapping[str, Agreement], command: str, setting: str, raw: Path,
) -> str:  # fmt: skip
    """Return the page's text."""
    first = rows[0]
    lines = [
        *page_head(
            "llama.cpp with an extracted draft",
            "how fast llama.cpp writes with a nested model, alone and with its first layers as "
            "the model that drafts, and how near each type of weights is to the model",
            "[llama.cpp](../engines_llama_cpp.md)",
        ),
        f"    {command}",
        "",
        f"All servers continue the same {first['texts']} prompts in turns, "
        f"{first['tokens'] // first['texts']} new tokens each, one text at a time, greedily; the "
        f"draft has {draft.depth} of {files.num_layers} layers and writes up to "
        f"{draft.num_draft_tokens} tokens, with a least probability of "
        f"{draft.least_confidence:g} ({draft.origin}). Times are llama-server's own, of new "
        "tokens alone; median of the rounds, least and largest. *texts equal*: those with the "
        "draft that are, token for token, those without it, in the last round.",
        "",
        *speed_table(rows, kinds),
        "Every token written without a draft was compared with transformers' most likely one after "
        "the same text, in float32 (end tokens were not allowed). Margins are how far, in logits, "
        "the others are below it. The servers run with llama.cpp's defaults, keys and values in "
        "f16 and flash attention; `convert gguf` compares without both.",
        "",
        *file_table(files, kinds, draft, agreements),
        *facts(setting, ("torch", "transformers")),
        f"- raw rows: [{raw.name}]({raw.name})",
        "",
    ]
    return "\n".join(lines)
