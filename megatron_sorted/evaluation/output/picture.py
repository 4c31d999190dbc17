"""The picture: quality of every sub-model over depth at the left, over operations at the right, a row for each text, set and task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.reporting.drawing import COLOURS, MARKERS, TITLED, figure_of, name_lines

MAX_MODELS = len(COLOURS)
WIDE, HIGH = 14.0, 5.0
"""Inches: of the picture, of a row."""


@dataclass(frozen=True)
class Line:
    """One model in one row: by increasing depth its values and their standard errors (0: unknown)."""

    name: str
    depths: list[int]
    flops: list[float]
    values: list[float]
    errors: list[float]


@dataclass(frozen=True)
class PictureRow:
    """One row of the picture; ``percent``: values are shares."""

    title: str
    unit: str
    lines: list[Line]
    percent: bool


def rows_of(results: dict) -> list[PictureRow]:
    """Return the rows: the loss on every text, exact match on every question set, the first metric of every task."""
    rows = []
    for name, text in results["texts"].items():
        rows.append(
            PictureRow(
                f"Held-out loss, {name} (lower is better)",
                "nats per token",
                _lines(
                    results, text, lambda numbers: (numbers["loss"], numbers["loss_standard_error"])
                ),
                False,
            )
        )
    for name, data in results.get("data", {}).items():
        rows.append(
            PictureRow(
                f"Loss, {name}, prepared (lower is better)",
                "nats per token",
                _lines(
                    results, data, lambda numbers: (numbers["loss"], numbers["loss_standard_error"])
                ),
                False,
            )
        )
    for name, asked in results["questions"].items():
        rows.append(
            PictureRow(
                f"Exact match, {name} (higher is better)",
                "questions answered right",
                _lines(
                    results,
                    asked,
                    lambda numbers: (numbers["exact_match"], numbers["exact_match_standard_error"]),
                ),
                True,
            )
        )
    for name, task in results["tasks"].items():
        metrics = [
            metric
            for numbers in next(iter(task["models"].values()))["exits"].values()
            for metric in numbers
            if metric != "samples"
        ]
        if metrics:
            rows.append(
                PictureRow(
                    f"{name}, {metrics[0]}",
                    metrics[0],
                    _lines(
                        results,
                        task,
                        lambda numbers, metric=metrics[0]: (
                            numbers[metric]["value"],
                            numbers[metric]["standard_error"],
                        ),
                    ),
                    False,
                )
            )
    return rows


def draw(results: dict, output: Path) -> None:
    """Write the PNG."""
    rows = rows_of(results)
    style = TITLED | {"xtick.color": "#333333", "ytick.color": "#333333"}
    with figure_of(output, WIDE, HIGH * len(rows), style) as figure:
        grid = figure.subplots(len(rows), 2, squeeze=False)
        figure.get_layout_engine().set(h_pad=0.2, w_pad=0.2)
        for row, (left, right) in zip(rows, grid, strict=True):
            _draw(left, row, lambda line: line.depths)
            _draw(right, row, lambda line: line.flops)
            left.set_title(row.title, pad=14)
            left.set_ylabel(row.unit)
            _ticks(left, row)
        figure.canvas.draw()  # labels need to know where points lie
        for row, (left, right) in zip(rows, grid, strict=True):
            name_lines(
                left,
                [
                    (line.name, colour, line.depths, line.values)
                    for line, colour in zip(row.lines, COLOURS, strict=False)
                ],
            )
            name_lines(
                right,
                [
                    (line.name, colour, line.flops, line.values)
                    for line, colour in zip(row.lines, COLOURS, strict=False)
                ],
            )


def _lines(
    results: dict, measured: dict, number: Callable[[dict], tuple[float, float | None]]
) -> list[Line]:
    lines = []
    for name, model in measured["models"].items():
        depths = sorted(model["exits"])
        pairs = [number(model["exits"][depth]) for depth in depths]
        flops = [results["models"][name]["exits"][depth]["flops_per_token"] for depth in depths]
        lines.append(
            Line(
                name,
                depths,
                flops,
                [value for value, _ in pairs],
                [error or 0.0 for _, error in pairs],
            )
        )
    return lines


def _draw(axes, row: PictureRow, where: Callable[[Line], Sequence[float]]) -> None:
    from matplotlib.ticker import EngFormatter, PercentFormatter

    for line, colour, marker in zip(row.lines, COLOURS, MARKERS, strict=False):
        low = [value - error for value, error in zip(line.values, line.errors, strict=True)]
        high = [value + error for value, error in zip(line.values, line.errors, strict=True)]
        axes.fill_between(where(line), low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            where(line),
            line.values,
            color=colour,
            marker=marker,
            linewidth=2.5,
            markersize=8,
            clip_on=False,
            markeredgecolor="white",
            markeredgewidth=1.0,
        )
    top = max(value for line in row.lines for value in line.values)
    axes.set_ylim(0, 1.12 * top or 1.0)
    if row.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1 if 0 < top < 0.05 else 0))
    axes.grid(axis="y", color="#e2e2e2")
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    if where(row.lines[0]) is row.lines[0].flops:
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlabel("forward FLOPs per token of that sub-model")


def _ticks(axes, row: PictureRow) -> None:
    depths = sorted({depth for line in row.lines for depth in line.depths})
    step = -(-len(depths) // 12)
    shown = depths[::-1][::step][::-1]  # the full model always
    axes.set_xticks(shown)
    axes.set_xlabel("layers run")
