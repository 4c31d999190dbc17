"""The picture of an evaluation: quality of every sub-model over its depth and its operations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.reporting.drawing import COLOURS, MARKERS, TITLED, figure_of, name_lines

MAX_MODELS = len(COLOURS)
WIDE, HIGH = 14.0, 5.0
"""Width of the picture and height of a row in inches."""


@dataclass(frozen=True)
class Line:
    """The line of one model, by increasing depth.

    Attributes:
        name: Name of the model.
        depths, flops: Depth and operations of each sub-model.
        values, errors: Value and standard error (0 if unknown) of each sub-model.
    """

    name: str
    depths: list[int]
    flops: list[float]
    values: list[float]
    errors: list[float]


@dataclass(frozen=True)
class PictureRow:
    """One row of the picture.

    Attributes:
        title, unit: Title of the row, and unit of the values.
        lines: Lines of the models.
        percent: Whether values are shares.
    """

    title: str
    unit: str
    lines: list[Line]
    percent: bool


def rows_of(results: dict) -> list[PictureRow]:
    """Return a row for the loss on every text, every set of questions and every task."""
    texts = {f"Held-out loss, {name}": one for name, one in results["texts"].items()}
    data = {f"Loss, {name}, prepared": one for name, one in results.get("data", {}).items()}
    rows = []
    for title, measured in (texts | data).items():
        lines = _lines(results, measured, _with_error("loss"))
        rows.append(PictureRow(f"{title} (lower is better)", "nats per token", lines, False))
    for name, measured in results["questions"].items():
        title, unit = f"Exact match, {name} (higher is better)", "questions answered right"
        lines = _lines(results, measured, _with_error("exact_match"))
        rows.append(PictureRow(title, unit, lines, True))
    for name, task in results["tasks"].items():
        metrics = [
            metric
            for numbers in next(iter(task["models"].values()))["exits"].values()
            for metric in numbers
            if metric != "samples"
        ]
        if metrics:
            lines = _lines(results, task, _metric(metrics[0]))
            rows.append(PictureRow(f"{name}, {metrics[0]}", metrics[0], lines, False))
    return rows


def _with_error(key: str) -> Callable[[dict], tuple[float, float | None]]:
    return lambda numbers: (numbers[key], numbers[f"{key}_standard_error"])


def _metric(name: str) -> Callable[[dict], tuple[float, float | None]]:
    return lambda numbers: (numbers[name]["value"], numbers[name]["standard_error"])


def draw(results: dict, output: Path) -> None:
    """Write the picture as PNG."""
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
        figure.canvas.draw()  # labels are placed by the positions of points
        for row, (left, right) in zip(rows, grid, strict=True):
            lines = list(zip(row.lines, COLOURS, strict=False))
            name_lines(
                left, [(line.name, colour, line.depths, line.values) for line, colour in lines]
            )
            name_lines(
                right, [(line.name, colour, line.flops, line.values) for line, colour in lines]
            )


def _lines(
    results: dict, measured: dict, number: Callable[[dict], tuple[float, float | None]]
) -> list[Line]:
    """Return the line of every model; ``number`` returns a value and its standard error."""
    lines = []
    for name, model in measured["models"].items():
        depths = sorted(model["exits"])
        pairs = [number(model["exits"][depth]) for depth in depths]
        flops = [results["models"][name]["exits"][depth]["flops_per_token"] for depth in depths]
        values, errors = [value for value, _ in pairs], [error or 0.0 for _, error in pairs]
        lines.append(Line(name, depths, flops, values, errors))
    return lines


def _draw(axes, row: PictureRow, where: Callable[[Line], Sequence[float]]) -> None:
    """Draw the lines of a row over their depths or operations."""
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
    axes.set_xticks(depths[::-1][::step])  # from the last, so that the full model has a tick
    axes.set_xlabel("layers run")
