"""A picture from its empty axes to its file, and the colours of all pictures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_sorted.files import replaced_file

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's: told apart by colour-blind readers."""
MARKERS = "osD^vP"
GAP = 7.0
"""Points between a marker and the name beside it."""
STRIDE = 4.0
"""Points between two places of a line that names should not cover."""
MOST_PLACES = 12
"""Points of a line beside which its name may stand."""
Rectangle = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""
NamedLine = tuple[str, str, Sequence[float], Sequence[float]]
"""Name, colour, x and y of a line."""
OPEN = {"axes.spines.top": False, "axes.spines.right": False}
TITLED = {
    "font.size": 13,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 14,
    "axes.edgecolor": "#555555",
}
"""Panels with bold titles of their own."""


@contextmanager
def figure_of(
    path: Path, width: float, height: float, style: Mapping[str, Any], dpi: int = 100
) -> Iterator[Any]:
    """Yield an empty figure to draw on; then write the PNG, whole or not at all.

    Args:
        path: The picture; its folder is made.
        width, height: Size in inches.
        style: Parameters of matplotlib.
        dpi: Points per inch.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(OPEN | dict(style)):
        figure = pyplot.figure(figsize=(width, height), dpi=dpi, layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as aside:
            figure.savefig(aside, format="png")
        pyplot.close(figure)


@contextmanager
def drawing(
    path: Path, title: str, width: float, height: float, columns: int = 1, **more: Any
) -> Iterator[tuple]:
    """Yield a figure with a title and its axes (an array of them for several columns); then write the PNG.

    Args:
        path: The picture; its folder is made.
        title: Stands above all axes.
        width, height: Size in inches.
        columns: Axes side by side.
        **more: For matplotlib's ``subplots``.
    """
    with figure_of(path, width, height, {}) as figure:
        axes = figure.subplots(1, columns, **more)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        yield figure, axes


def name_lines(axes: Any, lines: Sequence[NamedLine]) -> None:
    """Write each line's name beside it in its colour, over no other name and over as little as can be; after the figure was drawn."""
    to_points = 72 / axes.figure.dpi
    (left, bottom), (right, top) = (
        axes.transAxes.transform(corner) * to_points for corner in ((0, 0), (1, 1))
    )
    placed = [
        [
            tuple(axes.transData.transform(point) * to_points)
            for point in zip(x, y, strict=True)
            if not math.isnan(point[1])
        ]
        for _, _, x, y in lines
    ]
    obstacles = [point for line in placed for point in line]
    for line in placed:
        for (x, y), (next_x, next_y) in pairwise(line):
            count = int(math.hypot(next_x - x, next_y - y) / STRIDE)
            obstacles += [
                (x + (next_x - x) * n / count, y + (next_y - y) * n / count)
                for n in range(1, count)
            ]
    taken: list[Rectangle] = []
    for (name, colour, _, _), line in zip(lines, placed, strict=True):
        text = axes.annotate(
            name,
            (0, 0),
            xycoords="figure points",
            color=colour,
            weight="bold",
            fontsize=14,
            ha="left",
            va="bottom",
            annotation_clip=False,
        )
        extent = text.get_window_extent()
        beside = line[:: -(-len(line) // MOST_PLACES) or 1]
        box = place_name(
            beside,
            (extent.width * to_points, extent.height * to_points),
            obstacles,
            taken,
            (left, bottom, right, top + 4),
        )
        text.xy = box[:2]
        text.set_position(box[:2])
        taken.append(box)


def place_name(
    line: Sequence[tuple[float, float]],
    size: tuple[float, float],
    obstacles: Sequence[tuple[float, float]],
    taken: Sequence[Rectangle],
    panel: Rectangle,
) -> Rectangle:
    """Return where a name of this width and height stands: beside one of its line's points, in the panel, over as little as can be.

    Args:
        line: The points of its line.
        obstacles: Points of all lines, close together.
        taken: Boxes of the names that stand already.
    """
    width, height = size
    rectangles = []
    for x, y in line:
        if panel[0] <= x <= panel[2] and panel[1] <= y <= panel[3]:
            lefts = (x + GAP, x - width / 2, x - GAP - width)
            bottoms = (y + GAP, y - height / 2, y - GAP - height)
            rectangles += [
                (left, bottom, left + width, bottom + height)
                for bottom in bottoms
                for left in lefts
                if (left, bottom) != (lefts[1], bottoms[1])
            ]
    if not rectangles:  # no point of the line is in the panel
        return panel[0], panel[3], panel[0] + width, panel[3] + height

    def count(box: Rectangle, margin: float) -> int:
        return sum(
            box[0] - margin <= x <= box[2] + margin and box[1] - margin <= y <= box[3] + margin
            for x, y in obstacles
        )

    def faults(box: Rectangle) -> tuple[float, float]:
        covered = 10 * count(box, 2) + count(box, 12)
        outside = sum(
            max(0.0, inner - outer)
            for inner, outer in (
                (panel[0], box[0]),
                (panel[1], box[1]),
                (box[2], panel[2]),
                (box[3], panel[3]),
            )
        )
        overlap = sum(
            box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
            for other in taken
        )
        return 1000 * overlap + 100 * outside + covered, box[0]

    return min(rectangles, key=faults)
