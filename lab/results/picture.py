"""The picture: two panels of quality over depth, with a named line for each method."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.results.measured import NAMES, Number, Numbers
from lab.results.recipe import HEADS
from megatron_sorted.reporting import drawing

COLOURS = dict(
    zip(("nested", "ordinary", HEADS, "nested-linear"), drawing.COLOURS, strict=False)
) | {"before": "#777777"}
"""Model -> colour; grey is the model that all methods start from."""
MARKERS = {"before": "v", "ordinary": "s", HEADS: "D", "nested": "o", "nested-linear": "^"}


@dataclass(frozen=True)
class ResultPanel:
    """One panel.

    Attributes:
        kind, score: ``texts`` and ``loss``, or ``questions`` and ``exact_match``.
        name: The name of the set.
        first: The first depth that is shown.
        top: The largest value that is shown; all for None.
    """

    kind: str
    name: str
    score: str
    title: str
    unit: str
    first: int = 1
    top: float | None = None


def draw(numbers: Numbers, panels: Sequence[ResultPanel], output: Path) -> None:
    """Write a PNG of 1400 x 620 points.

    Bands are one standard error over documents, bars one standard deviation over seeds.
    """
    with drawing.figure_of(output, 7 * len(panels), 6.2, drawing.TITLED) as figure:
        row = figure.subplots(1, len(panels))
        figure.get_layout_engine().set(h_pad=0.2, w_pad=0.2)
        for axes, panel in zip(row, panels, strict=True):
            _draw(axes, panel, numbers)
        figure.canvas.draw()  # names are placed by where points are
        for axes, panel in zip(row, panels, strict=True):
            depths = _shown(panel, numbers)
            drawing.name_lines(
                axes,
                [
                    (
                        NAMES[model],
                        COLOURS[model],
                        depths,
                        [number.value for number in _values(panel, numbers, model)],
                    )
                    for model in numbers.models
                ],
            )


def _draw(axes, panel: ResultPanel, numbers: Numbers) -> None:
    from matplotlib.ticker import PercentFormatter

    depths = _shown(panel, numbers)
    largest = 0.0
    for model in numbers.models:
        line = _values(panel, numbers, model)
        values, colour = [number.value for number in line], COLOURS[model]
        largest = max(largest, *values)
        axes.fill_between(
            depths,
            [number.value - number.error for number in line],
            [number.value + number.error for number in line],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
        axes.plot(
            depths,
            values,
            color=colour,
            marker=MARKERS[model],
            linewidth=2.5,
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=1.0,
            clip_on=panel.top is not None,
        )
        if any(number.spread for number in line):
            axes.errorbar(
                depths,
                values,
                [number.spread or 0.0 for number in line],
                color=colour,
                fmt="none",
                capsize=4,
                linewidth=1.5,
            )
    axes.set_title(panel.title, pad=14)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("layers run")
    axes.set_xticks(depths)
    if panel.top is not None:
        lowest = min(
            number.value for model in numbers.models for number in _values(panel, numbers, model)
        )
        axes.set_ylim(lowest - 0.06 * (panel.top - lowest), panel.top)
    else:
        axes.set_ylim(0, 1.06 * largest or 1.0)
    if panel.score != "loss":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", color="#e2e2e2")
    axes.set_axisbelow(True)
    axes.margins(x=0.06)


def _shown(panel: ResultPanel, numbers: Numbers) -> list[int]:
    return [depth for depth in numbers.depths if depth >= panel.first]


def _values(panel: ResultPanel, numbers: Numbers, model: str) -> list[Number]:
    return [
        numbers.number(panel.kind, panel.name, model, depth, panel.score)
        for depth in _shown(panel, numbers)
    ]
