"""The page of a contest."""

import textwrap
from collections.abc import Sequence
from typing import Any

from lab.build_llama_cpp import VERSION
from lab.contests.contenders import BY_TORCH, LLAMA, OURS, TRANSFORMERS
from lab.contests.rounds import Row
from lab.contests.summary import (
    GOALS,
    KIND_PAIRS,
    Spread,
    fastest,
    matches_of,
    names_of,
    ratio,
    speeds,
    verdict_of,
    verdicts,
)
from lab.results.pages import page_head
from megatron_sorted.reporting.markdown import facts, table

PARTS = {
    "a": "Plain decoding, batch 1",
    "b": "Reading a prompt",
    "c": "Batches",
    "d": "Lossless strategies, batch 1",
}
HOW = (
    "All contenders have the same weights, read the same token ids, choose greedily and write the "
    "same number of tokens. They take turns in every round, and in every round another one begins; "
    "one computes at a time. Figures are medians over rounds (range in brackets), ratios are "
    "medians of the ratios within a round.",
    "Our seconds, and transformers', are those of a clock around the whole call. llama.cpp's are "
    "its server's own, so that HTTP costs it nothing: in plain decoding those of the new tokens "
    "alone, while ours include the prompt; for a prompt those of the prompt; with strategies those "
    "of prompt and new tokens. Batches are timed by our clock for all, with as many requests at "
    "once for llama.cpp.",
    "llama.cpp is built natively for this CPU in release mode. Its keys and values are float32 for "
    "F32 and float16, its default, for the others; ours are float32 and bfloat16. Servers wait "
    "without polling.",
    "*GB a token*: the weights of one pass, each read once. *GB/s*: that times the tokens a "
    "second. *of memory*: the share of a plain read of a large buffer by as many threads, "
    "measured in every round. *same*: texts equal to those of our `full` with the same kind of "
    "weights (Q8_0 and Q4_K_M: int8), in all rounds.",
    "The fastest strategy is the one with the best median of the same rounds.",
)


def spread_text(spread: Spread, digits: int = 1) -> str:
    """Return a median with its range.

    >>> spread_text(Spread(2.0, 1.5, 3.25))
    '2.0 (1.5 to 3.2)'
    """
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f} to {spread.most:.{digits}f})"


def goal_lines(rows: Sequence[Row]) -> list[str]:
    """Return the table of targets."""
    cells = [
        [
            f"{one.goal.title}: {one.model}",
            f"{one.threads}",
            f"{one.goal.wanted:g}",
            spread_text(one.reached, 2),
            one.word,
            f"{one.ours} / {one.theirs}",
        ]
        for one in verdicts(rows)
    ]
    if not cells:
        return []
    heads = ["ratio", "threads", "wanted", "reached", "verdict", "contenders"]
    return ["## Targets", "", *table(heads, cells)]


def plain_lines(rows: Sequence[Row]) -> list[str]:
    """Return the table of one match of parts a, b or d."""
    memory = Spread.of(row["speed"] for row in rows if row["name"] == "memory").median
    part, cells = rows[0]["part"], []
    for name in names_of(rows):
        own = [row for row in rows if row["name"] == name]
        speed = Spread.of(speeds(rows, name).values())
        line = [name, spread_text(speed)]
        if part in "ad":
            size, rate = own[0]["num_bytes"], own[0]["num_bytes"] * speed.median
            plain = own[0]["strategy"] == "full"
            line += [
                f"{size / 1e9:.3f}",
                f"{rate / 1e9:.1f}" if plain else "",
                f"{rate / memory:.0%}" if plain else "",
                same_text(own),
            ]
        if part == "d":
            line += [
                ratio_text(rows, name, own[0], LLAMA),
                ratio_text(rows, name, own[0], TRANSFORMERS),
                accepted_text(own),
            ]
        cells.append(line)
    heads = ["contender", "tokens/s"]
    if part in "ad":
        heads += ["GB a token", "GB/s", "of memory", "same"]
    if part == "d":
        heads += ["over llama.cpp's fastest", "over transformers", "accepted"]
    first = rows[0]
    count = 1 + max(row["round"] for row in rows)
    where = f"{first['model']}, {first['threads']} thread" + "s" * (first["threads"] > 1)
    where += f", {count} rounds; memory {memory / 1e9:.1f} GB/s"
    return [f"**{where}**", "", *table(heads, cells)]


def same_text(own: Sequence[Row]) -> str:
    """Return how many texts of a contender's rows equal ours."""
    known = [row for row in own if "same" in row]
    return f"{sum(row['same'] for row in known)} of {sum(row['texts'] for row in known)}" * bool(
        known
    )


def accepted_text(own: Sequence[Row]) -> str:
    """Return the share of drafted tokens that were accepted."""
    drafted = sum(row["drafted"] for row in own)
    return f"{sum(row['accepted'] for row in own) / drafted:.0%}" if drafted else ""


def ratio_text(rows: Sequence[Row], name: str, own: Row, peer: str) -> str:
    """Return the ratio of one of our contenders to the fastest of a peer at the same precision."""
    if own["engine"] not in (OURS, BY_TORCH):
        return ""
    kind = KIND_PAIRS[own["kind"]] if peer == LLAMA else "float32"
    other = fastest(rows, peer, kind)
    if other is None:
        return ""
    return f"{ratio(speeds(rows, name), speeds(rows, other)).median:.2f}"


def batch_lines(rows: Sequence[Row]) -> list[str]:
    """Return the table of one match of part c: a column for each size of a batch."""
    groups = list(dict.fromkeys(row["group"] for row in rows if "group" in row))
    cells = [
        [name, *(spread_text(Spread.of(speeds(rows, name, one).values())) for one in groups)]
        for name in names_of(rows)
    ]
    title = f"**{rows[0]['model']}, threads: {rows[0]['threads']}; tokens/s of all texts together**"
    return [title, "", *table(["contender", *groups], cells)]


def group_lines(rows: Sequence[Row]) -> list[str]:
    """Return the goals of part d for each group of questions."""
    groups = list(dict.fromkeys(row["group"] for row in rows if "group" in row))
    cells = []
    for goal in GOALS:
        verdict_by_group = [
            (group, verdict_of(goal, rows, group)) for group in groups if goal.part == "d"
        ]
        cells += [
            [goal.title, group, f"{goal.wanted:g}", spread_text(one.reached, 2), one.word]
            for group, one in verdict_by_group
            if one is not None
        ]
    if len(groups) < 2 or not cells:
        return []
    return table(["ratio", "group", "wanted", "reached", "verdict"], cells)


def idle_line(rows: Sequence[Row]) -> str:
    """Return a sentence about the processor time of whoever waited."""
    waited = sum(row.get("others_seconds", 0.0) for row in rows)
    whole = sum(row.get("seconds", 0.0) for row in rows)
    share = waited / whole if whole else 0.0
    loads = [row["load"] for row in rows if "load" in row]
    busiest = f" The highest load average before a round was {max(loads):.1f}." if loads else ""
    return (
        f"While a contender computed ({whole:.0f} s), the waiting ones used {waited:.1f} s of "
        f"processor time ({share:.2%}).{busiest}"
    )


def page(rows: Sequence[Row], stored: dict[str, Any], settings: dict, command: str) -> str:
    """Return the page.

    Args:
        rows: All rows.
        stored: The store's facts.
        settings: The store's settings.
        command: The command that measures again.
    """
    lines = page_head(
        "Contest of decoders on CPUs",
        "how fast the compiled decoder writes beside llama.cpp and transformers, with the same "
        "weights and prompts",
        "[The compiled decoder](../native_decoding.md)",
    )
    lines += [f"    {command}", "", *goal_lines(rows), "![Tokens a second](../images/contest.png)"]
    lines += [""]
    for part, title in PARTS.items():
        members = [one for one in matches_of(rows).values() if one[0]["part"] == part]
        if not members:
            continue
        lines += [f"## {title}", ""]
        for one in members:
            lines += batch_lines(one) if part == "c" else plain_lines(one)
            lines += group_lines(one) if part == "d" else []
    wrapped = [
        textwrap.fill(text, 100, initial_indent="- ", subsequent_indent="  ")
        for text in (*HOW, idle_line(rows))
    ]
    lines += ["## How it is measured", "", *wrapped]
    for key, options in sorted(stored.get("tuned", {}).items()):
        lines += [
            f"- tuned, {key}, `{name}`: "
            + ", ".join(f"{option} {value}" for option, value in values.items())
            for name, values in options.items()
        ]
    threads = " and ".join(map(str, sorted({row["threads"] for row in rows})))
    lines += ["", *facts(f"{threads} threads", ("torch", "transformers"))]
    lines += [
        f"- measured at commits: {', '.join(stored.get('commits', []))}",
        f"- llama.cpp: of llama-cpp-python {VERSION}, `python -m lab.build_llama_cpp`",
        f"- new tokens a text: {settings['num_tokens']}; raw rows: [contest.json](contest.json)",
        "",
    ]
    return "\n".join(lines)
