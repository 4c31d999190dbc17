"""Drawing pictures: figures written to files, names beside lines, colours of all pictures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_sorted.files import replaced_file

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Colours of Okabe and Ito, which colour-blind readers can distinguish."""
MARKERS = "osD^vP"
GAP = 7.0
"""Points between a marker and the name beside it."""
STRIDE = 4.0
"""Distance in points of the places on a line that names should not cover."""
MAX_PLACES = 12
"""Largest number of places on a line that its name may stand beside."""
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
"""Style of panels with bold titles."""


@contextmanager
def figure_of(
    path: Path, width: float, height: float, style: Mapping[str, Any], dpi: int = 100
) -> Iterator[Any]:
    """Yield an empty figure to draw on; then write the PNG, completely or not at all.

    Args:
        path: The picture; its folder is created.
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
        with replaced_file(path) as temporary:
            figure.savefig(temporary, format="png")
        pyplot.close(figure)


@contextmanager
def drawing(
    path: Path, title: str, width: float, height: float, columns: int = 1, **more: Any
) -> Iterator[tuple]:
    """Yield a figure with a title, and its axes (an array for several columns); then write the PNG.

    Args:
        path: The picture; its folder is created.
        title: The title above all axes.
        width, height: Size in inches.
        columns: Number of axes side by side.
        **more: Further arguments of matplotlib's ``subplots``.
    """
    with figure_of(path, width, height, {}) as figure:
        axes = figure.subplots(1, columns, **more)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        yield figure, axes


def name_lines(axes: Any, lines: Sequence[NamedLine]) -> None:
    """Write each line's name beside it in its colour; the figure must have been drawn before.

    A name covers no other name and as little of the lines as possible.
    """
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
        places = line[:: -(-len(line) // MAX_PLACES) or 1]
        rectangle = place_name(
            places,
            (extent.width * to_points, extent.height * to_points),
            obstacles,
            taken,
            (left, bottom, right, top + 4),
        )
        text.xy = rectangle[:2]
        text.set_position(rectangle[:2])
        taken.append(rectangle)


def place_name(
    line: Sequence[tuple[float, float]],
    size: tuple[float, float],
    obstacles: Sequence[tuple[float, float]],
    taken: Sequence[Rectangle],
    panel: Rectangle,
) -> Rectangle:
    """Choose a name's rectangle: beside its line, in the panel, covering as little as possible.

    Args:
        line: The points of the name's line.
        size: Width and height of the name.
        obstacles: Points of all lines, close together.
        taken: Rectangles of the names placed before.
        panel: The rectangle of the axes.
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

    def num_covered(rectangle: Rectangle, margin: float) -> int:
        left, bottom, right, top = rectangle
        return sum(
            left - margin <= x <= right + margin and bottom - margin <= y <= top + margin
            for x, y in obstacles
        )

    def cost(rectangle: Rectangle) -> tuple[float, float]:
        left, bottom, right, top = rectangle
        covered = 10 * num_covered(rectangle, 2) + num_covered(rectangle, 12)
        beyond = (panel[0] - left, panel[1] - bottom, right - panel[2], top - panel[3])
        outside = sum(max(0.0, distance) for distance in beyond)
        overlap = sum(
            left < other[2] and other[0] < right and bottom < other[3] and other[1] < top
            for other in taken
        )
        return 1000 * overlap + 100 * outside + covered, left

    return min(rectangles, key=cost)
