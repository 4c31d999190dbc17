"""The picture: two panels of quality over depth, a line for each method with its name beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from .measured import NAMES, Number, Numbers
from .recipe import HEADS

COLOURS = {"before": "#777777", "ordinary": "#D55E00", HEADS: "#009E73", "nested": "#0072B2", "nested-linear": "#CC79A7"}
"""Those of tools/evaluation/picture.py (Okabe and Ito), and grey for where all started."""
MARKERS = {"before": "v", "ordinary": "s", HEADS: "D", "nested": "o", "nested-linear": "^"}
SPACING = 20.0
"""Points between the middles of two names."""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        kind, name, score: ``texts`` and ``loss``, or ``questions`` and ``exact_match``, of the set of this name.
        first, top: The first depth that is shown, and the largest value; None: all of them.
    """

    kind: str
    name: str
    score: str
    title: str
    unit: str
    first: int = 1
    top: float | None = None


def draw(numbers: Numbers, panels: Sequence[Panel], output: Path) -> None:
    """Writes a PNG of 1400 x 620 points; bands are one standard error over documents, bars one standard deviation over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
             "axes.titleweight": "bold", "axes.titlesize": 14, "axes.edgecolor": "#555555"}
    with pyplot.rc_context(style):
        figure, row = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), 6.2), dpi=100, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.2, w_pad=0.2)
        for axes, panel in zip(row, panels, strict=True):
            _draw(axes, panel, numbers)
        figure.canvas.draw()  # names need to know where points lie
        for axes, panel in zip(row, panels, strict=True):
            _name_lines(axes, panel, numbers)
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = output.with_name(f".{output.name}.writing")
        figure.savefig(aside, format="png")
        pyplot.close(figure)
    aside.replace(output)


def spread_out(heights: Sequence[float], spacing: float, low: float, high: float) -> list[float]:
    """Returns increasing heights moved as little as it takes for neighbours to be ``spacing`` apart, between ``low`` and ``high``."""
    moved = list(heights)
    for _ in range(200):
        for place, (below, above) in enumerate(pairwise(moved)):
            if (lack := spacing - (above - below)) > 1e-6:
                moved[place], moved[place + 1] = below - lack / 2, above + lack / 2
        moved = [min(max(height, low), high) for height in moved]
    return moved


def _draw(axes, panel: Panel, numbers: Numbers) -> None:
    from matplotlib.ticker import PercentFormatter

    depths = _shown(panel, numbers)
    largest = 0.0
    for model in numbers.models:
        line = _values(panel, numbers, model)
        values, colour = [number.value for number in line], COLOURS[model]
        largest = max(largest, *values)
        axes.fill_between(depths, [number.value - number.error for number in line], [number.value + number.error for number in line],
                          color=colour, alpha=0.15, linewidth=0)
        axes.plot(depths, values, color=colour, marker=MARKERS[model], linewidth=2.5, markersize=8, markeredgecolor="white",
                  markeredgewidth=1.0, clip_on=panel.top is not None)
        if any(number.spread for number in line):
            axes.errorbar(depths, values, [number.spread or 0.0 for number in line], color=colour, fmt="none", capsize=4, linewidth=1.5)
    axes.set_title(panel.title, pad=14)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("layers run")
    axes.set_xticks(depths)
    if panel.top is not None:
        lowest = min(number.value for model in numbers.models for number in _values(panel, numbers, model))
        axes.set_ylim(lowest - 0.06 * (panel.top - lowest), panel.top)
    else:
        axes.set_ylim(0, 1.06 * largest or 1.0)
    if panel.score != "loss":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", color="#e2e2e2")
    axes.set_axisbelow(True)
    axes.margins(x=0.06)


def _name_lines(axes, panel: Panel, numbers: Numbers) -> None:
    """Writes the names where lines lie furthest apart, each in its line's colour and none over another."""
    to_points = 72 / axes.figure.dpi
    depths = _shown(panel, numbers)

    def points(place: int) -> list[tuple[float, str]]:
        return sorted((float(axes.transData.transform((depths[place], _values(panel, numbers, model)[place].value))[1]) * to_points, model)
                      for model in numbers.models)

    low, high = (float(axes.transAxes.transform((0, share))[1]) * to_points for share in (0, 1))

    def room(place: int) -> float:
        inside = [y for y, _ in points(place) if low <= y <= high]
        return sum(min(above - below, SPACING) for below, above in pairwise(inside))

    place = max(range(max(1, len(depths) - 2)), key=lambda place: (room(place), -place))
    found = [(y, model) for y, model in points(place) if low <= y <= high + 1]
    x = float(axes.transData.transform((depths[place], 0))[0]) * to_points
    for height, (_, model) in zip(spread_out([y for y, _ in found], SPACING, low + 8, high + 4), found, strict=True):
        axes.annotate(NAMES[model], (x + 11, height + 3), xycoords="figure points", color=COLOURS[model], weight="bold", fontsize=14,
                      ha="left", va="center", annotation_clip=False,
                      bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8})


def _shown(panel: Panel, numbers: Numbers) -> list[int]:
    return [depth for depth in numbers.depths if depth >= panel.first]


def _values(panel: Panel, numbers: Numbers, model: str) -> list[Number]:
    return [numbers.number(panel.kind, panel.name, model, depth, panel.score) for depth in _shown(panel, numbers)]
