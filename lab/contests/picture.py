"""The picture of a contest: tokens a second of every kind of weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.contests.contenders import BY_TORCH, LLAMA, OURS, TRANSFORMERS
from lab.contests.rounds import Row
from lab.contests.summary import KIND_PAIRS, Spread, fastest, matches_of, speeds
from megatron_sorted.reporting.drawing import COLOURS, figure_of

SERIES = (
    ("ours, best lossless strategy", OURS, False, True, COLOURS[2]),
    ("ours, full", OURS, True, False, COLOURS[0]),
    ("llama.cpp, best with draft", LLAMA, False, True, COLOURS[5]),
    ("llama.cpp, plain", LLAMA, True, False, COLOURS[1]),
    ("transformers", TRANSFORMERS, True, False, COLOURS[3]),
    ("ours by torch, full", BY_TORCH, True, False, COLOURS[4]),
)
"""Name, engine, whether plain, whether it needs a strategy, colour."""


def bars_of(rows: Sequence[Row]) -> list[tuple[str, str, str, Spread]]:
    """Return (kind, series, colour, tokens a second) of the bars of one match."""
    bars = []
    for kind, theirs in KIND_PAIRS.items():
        for title, engine, plain, speculative, colour in SERIES:
            own = [
                row
                for row in rows
                if row["name"] != "memory" and (row["strategy"] != "full") == speculative
            ]
            name = fastest(own, engine, theirs if engine == LLAMA else kind, None, plain)
            if name is not None:
                spread = Spread.of(speeds(own, name).values())
                bars.append((f"{kind} / {theirs}", title, colour, spread))
    return bars


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: tokens a second of parts a and d, a row of panels for each thread count."""
    matches = [one for one in matches_of(rows).values() if one[0]["part"] in "ad"]
    if not matches:
        return
    threads = sorted({one[0]["threads"] for one in matches})
    columns = list(dict.fromkeys((one[0]["part"], one[0]["model"]) for one in matches))
    size = (5.5 * len(columns) + 1, 4.2 * len(threads) + 1.2)
    with figure_of(path, *size, {}) as figure:
        panels = figure.subplots(len(threads), len(columns), squeeze=False)
        for one in matches:
            first = one[0]
            axes = panels[threads.index(first["threads"])][
                columns.index((first["part"], first["model"]))
            ]
            _panel(axes, one)
        for axes in panels.flat:
            if not axes.has_data():
                axes.set_axis_off()
        handles = {}
        for axes in panels.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(), handles.keys(), frameon=False, ncols=3, loc="outside lower center"
        )


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    bars = bars_of(rows)
    kinds = list(dict.fromkeys(kind for kind, *_ in bars))
    series = [title for title, *_ in SERIES if any(title == one for _, one, *_ in bars)]
    width = 0.84 / max(len(series), 1)
    for kind, title, colour, spread in bars:
        place = kinds.index(kind) + (series.index(title) - (len(series) - 1) / 2) * width
        error = [[spread.median - spread.least], [spread.most - spread.median]]
        drawn = axes.bar(
            place, spread.median, width, yerr=error, color=colour, label=title,
            error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
        )  # fmt: skip
        axes.bar_label(drawn, fmt="%.0f", fontsize=8, padding=2)
    first = rows[0]
    what = "plain" if first["part"] == "a" else "trained or agreeing exits"
    axes.set_title(f"{first['model']} ({what}), threads: {first['threads']}", loc="left")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.set_ylabel("tokens/s, batch 1 (bars: range)")
    axes.margins(y=0.12)
