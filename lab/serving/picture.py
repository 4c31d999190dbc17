"""The picture of the servers: tokens a second by the number of clients."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.contests.contenders import LLAMA, OURS, TRANSFORMERS
from lab.contests.rounds import Row
from lab.contests.summary import names_of
from lab.serving.contenders import BEFORE, FULL
from lab.serving.parts import THROUGHPUT
from lab.serving.rows import rows_of, speed
from lab.serving.vllm_servers import BY_LOAD, PLUG_IN, VLLM
from megatron_sorted.reporting.drawing import COLOURS, MARKERS, figure_of

STYLES = {
    OURS: COLOURS[2], BEFORE: COLOURS[0], LLAMA: COLOURS[1], TRANSFORMERS: COLOURS[3],
    VLLM: COLOURS[5], PLUG_IN: COLOURS[4],
}  # fmt: skip
"""Engine -> colour; lines of strategies that always speculate are dashed."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with a panel for each kind of weights, if there are rows of many clients."""
    rows = rows_of(rows, match=THROUGHPUT)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    if not kinds:
        return
    with figure_of(path, 5.5 * len(kinds) + 1, 5.2, {}) as figure:
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            _panel(axes, rows_of(rows, kind=kind), kind)
        handles = {}
        for axes in panels:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(),
            handles.keys(),
            frameon=False,
            ncols=min(len(kinds) + 1, 3),
            loc="outside lower center",
        )


def _panel(axes: Any, rows: Sequence[Row], kind: str) -> None:
    cases = sorted({row["case"] for row in rows})
    for name in names_of(rows):
        own = rows_of(rows, name=name)
        first = own[0]
        points = {}
        for case in cases:
            speeds = [speed(row) for row in rows_of(own, case=case)]
            if speeds:
                points[case] = statistics.median(speeds)
        solid = first["strategy"] == FULL or first["strategy"].endswith(BY_LOAD)
        axes.plot(
            [cases.index(case) for case in points], points.values(),
            color=STYLES[first["engine"]], linestyle="-" if solid else "--",
            marker=MARKERS[list(STYLES).index(first["engine"])], markersize=5,
            label=f"{first['engine']}, {first['strategy'].replace('_', '-')}",
        )  # fmt: skip
    axes.set_xticks(range(len(cases)), [str(case) for case in cases])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clients")
    axes.set_ylabel("tokens/s")
    axes.set_title(kind, loc="left")
