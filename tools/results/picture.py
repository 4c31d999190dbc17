"""The picture: two panels of quality over depth, a line for each method with its name beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_sorted.files import replaced_file

from .measured import NAMES, Number, Numbers
from .recipe import HEADS

COLOURS = {"before": "#777777", "ordinary": "#D55E00", HEADS: "#009E73", "nested": "#0072B2", "nested-linear": "#CC79A7"}
"""Those of tools/evaluation/picture.py (Okabe and Ito), and grey for where all started."""
MARKERS = {"before": "v", "ordinary": "s", HEADS: "D", "nested": "o", "nested-linear": "^"}
GAP = 7.0
"""Points between a marker and the name beside it."""
Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""


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
        with replaced_file(output) as aside:
            figure.savefig(aside, format="png")
        pyplot.close(figure)


def place_name(line: Sequence[tuple[float, float]], size: tuple[float, float], obstacles: Sequence[tuple[float, float]],
               taken: Sequence[Box], panel: Box) -> Box:
    """Returns where a name of this width and height stands: beside one of its line's points, in the panel, over as little as can be.

    Args:
        line: The points of its line.
        obstacles: Points of all lines, close together.
        taken: Boxes of the names that stand already.
    """
    width, height = size
    boxes = []
    for x, y in line:
        if panel[0] <= x <= panel[2] and panel[1] <= y <= panel[3]:
            lefts = (x + GAP, x - width / 2, x - GAP - width)
            bottoms = (y + GAP, y - height / 2, y - GAP - height)
            boxes += [(left, bottom, left + width, bottom + height) for bottom in bottoms for left in lefts
                      if (left, bottom) != (lefts[1], bottoms[1])]
    if not boxes:  # no point of the line is in the panel
        return panel[0], panel[3], panel[0] + width, panel[3] + height

    def count(box: Box, margin: float) -> int:
        return sum(box[0] - margin <= x <= box[2] + margin and box[1] - margin <= y <= box[3] + margin for x, y in obstacles)

    def faults(box: Box) -> tuple[float, float]:
        covered = 10 * count(box, 2) + count(box, 12)
        outside = sum(max(0.0, inner - outer) for inner, outer in ((panel[0], box[0]), (panel[1], box[1]), (box[2], panel[2]),
                                                                   (box[3], panel[3])))
        overlap = sum(box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken)
        return 1000 * overlap + 100 * outside + covered, box[0]

    return min(boxes, key=faults)


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
    """Writes each name in its line's colour, over no other name and as few lines as can be."""
    to_points, depths = 72 / axes.figure.dpi, _shown(panel, numbers)
    (left, bottom), (right, top) = (axes.transAxes.transform(corner) * to_points for corner in ((0, 0), (1, 1)))
    lines = {model: [tuple(axes.transData.transform((depth, number.value)) * to_points)
                     for depth, number in zip(depths, _values(panel, numbers, model), strict=True)] for model in numbers.models}
    obstacles = [((1 - share) * x + share * next_x, (1 - share) * y + share * next_y) for line in lines.values()
                 for (x, y), (next_x, next_y) in pairwise(line) for share in (place / 60 for place in range(61))]
    taken: list[Box] = []
    for model, line in lines.items():
        text = axes.annotate(NAMES[model], (0, 0), xycoords="figure points", color=COLOURS[model], weight="bold", fontsize=14,
                             ha="left", va="bottom", annotation_clip=False)
        extent = text.get_window_extent()
        box = place_name(line, (extent.width * to_points, extent.height * to_points), obstacles, taken, (left, bottom, right, top + 4))
        text.xy = box[:2]
        text.set_position(box[:2])
        taken.append(box)


def _shown(panel: Panel, numbers: Numbers) -> list[int]:
    return [depth for depth in numbers.depths if depth >= panel.first]


def _values(panel: Panel, numbers: Numbers, model: str) -> list[Number]:
    return [numbers.number(panel.kind, panel.name, model, depth, panel.score) for depth in _shown(panel, numbers)]
