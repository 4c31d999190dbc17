"""The page of the servers' measurement."""

import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from lab.build_llama_cpp import VERSION
from lab.contests.contenders import LLAMA, OURS
from lab.contests.rounds import Row
from lab.contests.summary import Spread, names_of
from lab.results.pages import page_head
from lab.serving.contenders import FULL
from lab.serving.parts import LONG_PROMPT, PREFIXES, THROUGHPUT
from lab.serving.ratios import engine_lines
from lab.serving.rows import efficiency, rows_of, speed
from lab.serving.vllm_servers import PLUG_IN, VLLM
from megatron_sorted.reporting.markdown import facts, table

PATH = re.compile(r"/\S*/")
"""The folders of a path, of which the page shows the last part."""
WANTED_GROWTH, FEW, MANY = 4.0, 1, 16
HOW = (
    "Every client waits for its text and then asks for the next one, over HTTP, with events as "
    "they come. All servers read the same tokens, choose greedily, write the same number of tokens "
    "a text (the served copy of the model has no end token) and may use the same number of "
    "threads; the clients are one further process on the same machine.",
    "Contenders take turns for each number of clients, and every round begins with another one. "
    "While one is measured, the processes of all others are halted (SIGSTOP). Figures are medians "
    "over rounds (range in brackets).",
    "*tokens/s*: all new tokens over the time from the first request to the last token, so that "
    "reading prompts counts. *tokens/CPU s*: the same tokens over the server's processor time. "
    "*pause*: the longest time between two events of one text, in the median round.",
    "No server remembers prompts, except where *prefixes kept* says so.",
    "*same*: texts equal to those that our `full` writes alone, one request at a time, with the "
    "same kind of weights (Q8_0: int8). llama.cpp and vLLM compute in another order; such texts "
    "may differ from ours after a near tie.",
    "*ours before*: the version below, which writes one request after another.",
)
VLLM_HOW = (
    "vLLM is three processes (API, engine, worker), whose processor time counts together. Its "
    "options are its defaults but for those that all servers share and those of the command above.",
)


def spread_of(
    rows: Sequence[Row], value: Callable[[Row], float], digits: int = 1, ranged: bool = True
) -> str:
    """Return the median of a value over rows, with its range."""
    if not rows:
        return ""
    spread = Spread.of(value(row) for row in rows)
    text = f"{spread.median:.{digits}f}"
    wide = ranged and len(rows) > 1
    return text + f" ({spread.least:.{digits}f} to {spread.most:.{digits}f})" * wide


def latency_text(rows: Sequence[Row]) -> str:
    """Return median and 95 % of the time to the first token, in seconds."""
    first = spread_of(rows, lambda row: row["first"], 2, False)
    return first and f"{first} / {spread_of(rows, lambda row: row['first_95'], 2, False)}"


def clients_table(rows: Sequence[Row], cell: Callable[[list[Row]], str]) -> list[str]:
    """Return a table with a row for each contender and a column for each number of clients."""
    cases = sorted({row["case"] for row in rows})
    cells = [
        [name, *(cell(rows_of(rows, name=name, case=case)) for case in cases)]
        for name in names_of(rows)
    ]
    heads = [f"{case} client" + "s" * (case > 1) for case in cases]
    return table(["contender", *heads], cells)


def throughput_lines(rows: Sequence[Row]) -> list[str]:
    """Return the section on many clients."""
    if not rows:
        return []
    return [
        "## Many clients", "", "Tokens/s:", "",
        *clients_table(rows, lambda own: spread_of(own, speed)),
        *growth_lines(rows),
        *engine_lines(rows),
        "Tokens/CPU s:", "",
        *clients_table(rows, lambda own: spread_of(own, efficiency, ranged=False)),
        "Seconds to the first token, median / 95 %:", "", *clients_table(rows, latency_text),
        "Longest pause between two tokens of a text [ms]:", "",
        *clients_table(rows, lambda own: spread_of(own, lambda row: 1000 * row["pause"], 0, False)),
        "Texts equal to those written alone, in all rounds:", "", *clients_table(rows, same_text),
    ]  # fmt: skip


def growth_of(rows: Sequence[Row], name: str) -> Spread | None:
    """Return how much faster a contender is with many clients than with one, within rounds."""
    speeds = {
        count: {row["round"]: speed(row) for row in rows_of(rows, name=name, case=count)}
        for count in (FEW, MANY)
    }
    shared = speeds[FEW].keys() & speeds[MANY].keys()
    if not shared:
        return None
    return Spread.of(speeds[MANY][number] / speeds[FEW][number] for number in shared)


def growth_lines(rows: Sequence[Row]) -> list[str]:
    """Return the sentence that compares many clients with one."""
    parts = []
    for name in names_of(rows):
        growth = growth_of(rows, name)
        if growth is not None:
            parts.append(f"{name}: {growth.median:.2f}")
            own = rows_of(rows, name=name)[0]
            if (own["engine"], own["kind"], own["strategy"]) == (OURS, "float32", FULL):
                met = "met" if growth.median >= WANTED_GROWTH else "missed"
                parts[-1] = f"**{parts[-1]} (wanted: {WANTED_GROWTH:g}; {met})**"
    if not parts:
        return []
    text = f"With {MANY} clients over {FEW}, times as many tokens a second: {'; '.join(parts)}."
    return [*textwrap.wrap(text, 100), ""]


def same_text(rows: Sequence[Row]) -> str:
    """Return how many texts are equal, and how many ended early."""
    if not rows or rows[0]["same"] is None:
        return ""
    text = f"{sum(row['same'] for row in rows)} of {sum(row['texts'] for row in rows)}"
    short = sum(row["short"] for row in rows)
    return text + f" ({short} short)" * bool(short)


def long_prompt_lines(rows: Sequence[Row], settings: dict[str, Any]) -> list[str]:
    """Return the section on the long prompt."""
    if not rows:
        return []
    cells = [
        [
            name,
            spread_of(own, lambda row: row["pause"], 2),
            spread_of(own, lambda row: row["silence"], 2),
            spread_of(own, lambda row: row["first"], 2),
        ]
        for name in names_of(rows)
        if (own := rows_of(rows, name=name))
    ]
    heads = ["contender", "longest pause [s]", "longest wait [s]", "its first token after [s]"]
    text = (
        f"A prompt of {settings['long_tokens']:,} tokens comes while {rows[0]['case']} clients "
        "receive texts, one after another. *pause*: between two tokens of a text; *wait*: of a "
        "client for anything, from its request on."
    )
    return ["## A long prompt among streams", "", *textwrap.wrap(text, 100), "",
            *table(heads, cells)]  # fmt: skip


def prefix_lines(rows: Sequence[Row]) -> list[str]:
    """Return the section on a conversation's turns."""
    if not rows:
        return []
    last = max(row["case"] for row in rows)
    turns = [turn for turn in (1, 2, 5, last) if turn <= last]
    cells = []
    for name in names_of(rows):
        own = rows_of(rows, name=name)
        cached = [row["cached"] for row in rows_of(own, case=last) if row["cached"] is not None]
        cells.append(
            [
                name,
                *(spread_of(rows_of(own, case=turn), lambda row: 1000 * row["first"], 0)
                  for turn in dict.fromkeys(turns)),
                f"{statistics.median(cached):.0f}" if cached else "",
                f"{sum(row['same'] for row in own)} of {len(own)}",
            ]
        )  # fmt: skip
    heads = ["contender", *(f"turn {turn} [ms]" for turn in dict.fromkeys(turns))]
    return [
        "## Turns of a conversation", "",
        "Time to the first token of a turn; *same*: answers equal in all contenders.", "",
        *table([*heads, f"tokens kept at turn {last}", "same"], cells),
    ]  # fmt: skip


def page(
    rows: Sequence[Row], stored: dict[str, Any], settings: dict, command: str, name: str = "serving"
) -> str:
    """Return the page.

    Args:
        rows: All rows.
        stored: The store's facts.
        settings: The store's settings.
        command: The command that measures again.
        name: Name of the page's files.
    """
    has_plug_in = bool(rows_of(rows, engine=PLUG_IN))
    lines = page_head(
        f"{VLLM} with our plug-in, by load" if has_plug_in else "Servers with many clients",
        "tokens a second and waiting times of our server beside others on CPUs",
        "[Other engines](../engines.md)" if has_plug_in else "[Decoding](../decoding.md)",
    )
    lines += [f"    {command}", "", f"![Tokens a second by clients](../images/{name}.png)", ""]
    lines += throughput_lines(rows_of(rows, match=THROUGHPUT))
    lines += long_prompt_lines(rows_of(rows, match=LONG_PROMPT), settings)
    lines += prefix_lines(rows_of(rows, match=PREFIXES))
    absent = [
        f"{name} did not take part: {PATH.sub('', why)}" for name, why in stored["absent"].items()
    ]
    lines += ["## How it is measured", ""]
    for text in (*HOW, *VLLM_HOW * bool(rows_of(rows, engine=VLLM)), *absent):
        one_line = " ".join(text.split())
        lines.append(
            textwrap.fill(one_line, 100, initial_indent="- ", subsequent_indent="  ",
                          break_long_words=False, break_on_hyphens=False)
        )  # fmt: skip
    rounds = {row["match"]: row["round"] + 1 for row in rows}
    threads = settings["threads"]
    lines += [
        "",
        f"- model: {settings['model']}; new tokens a text: {settings['num_tokens']}; rounds: "
        + ", ".join(f"{part} {count}" for part, count in rounds.items()),
        *facts(f"{threads} thread" + "s" * (threads > 1), ("torch", "transformers")),
        f"- measured at commits: {', '.join(stored.get('commits', []))}",
        *(f"- {name}: {version}" for name, version in stored.get("versions", {}).items()),
    ]
    if any(row["engine"] == LLAMA for row in rows):
        lines.append(f"- llama.cpp: of llama-cpp-python {VERSION}, `python -m lab.build_llama_cpp`")
    return "\n".join([*lines, f"- raw rows: [{name}.json]({name}.json)", ""])
