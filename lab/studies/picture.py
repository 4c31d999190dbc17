"""The picture of a study: every variant as a point, and the front that static weights trace."""

import math
from collections.abc import Mapping
from pathlib import Path

from lab.studies.outcomes import Outcomes, front
from lab.studies.variants import FAMILIES, VARIANTS
from megatron_sorted.reporting.drawing import TITLED, figure_of

COLOURS = {
    "static": "#555555",
    "learned": "#0072B2",
    "schedule": "#E69F00",
    "gradient": "#009E73",
    "distillation": "#D55E00",
    "teacher": "#56B4E9",
    "capacity": "#CC79A7",
    "combined": "#000000",
    "longer": "#7A5C00",
}
"""Family -> colour; those of Okabe and Ito, which colour-blind readers tell apart."""
SAME = 9.0
"""Distance in pixels within which points share a label."""

Point = tuple[float, float]
Rectangle = tuple[float, float, float, float]
"""Left, bottom, right, top."""


def draw(outcomes: Outcomes, title: str, output: Path) -> None:
    """Write a PNG of 1500 x 850 points; bars are 95 % intervals.

    The gap of the full model points to the right, the mean gap over depths upwards.
    """
    with figure_of(output, 15, 8.5, TITLED | {"font.size": 12}) as figure:
        axes = figure.subplots()
        everything = {name: outcomes.point(name) for name in outcomes.nested}
        noise = {
            name: (outcomes.full_gap(name).half_width or 0, outcomes.mean_gap(name).half_width or 0)
            for name in everything
        }
        points, outside = in_view(everything, outcomes.uniform, noise[outcomes.uniform])
        (left, right), (bottom, top) = (
            (
                min(points[name][axis] - noise[name][axis] for name in points),
                max(points[name][axis] + noise[name][axis] for name in points),
            )
            for axis in (0, 1)
        )
        line = front(
            [point for name, point in everything.items() if VARIANTS[name].family == "static"]
        )
        axes.plot(
            *zip(*line, strict=True),
            color=COLOURS["static"],
            linewidth=1.5,
            linestyle="--",
            zorder=1,
        )
        for family, long_name in FAMILIES.items():
            names = [name for name in points if VARIANTS[name].family == family]
            if names:
                bars = [[noise[name][axis] for name in names] for axis in (1, 0)]
                axes.errorbar(
                    *zip(*(points[name] for name in names), strict=True),
                    *bars,
                    fmt="o",
                    color=COLOURS[family],
                    markersize=7,
                    elinewidth=0.8,
                    capsize=2,
                    label=long_name.partition(":")[0],
                    zorder=3,
                )
        axes.axvline(points[outcomes.uniform][0], color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.axhline(points[outcomes.uniform][1], color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.set_xlim(left - 0.12 * (right - left) - 0.005, right + 0.12 * (right - left) + 0.005)
        axes.set_ylim(bottom - 0.08 * (top - bottom) - 0.005, top + 0.08 * (top - bottom) + 0.005)
        axes.set_title(title, pad=14)
        axes.set_xlabel(
            "gap of the full model, nats a token (nested - trained separately); left is better"
        )
        axes.set_ylabel("mean gap over all depths, nats a token; down is better")
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
        figure.legend(frameon=False, loc="outside right upper")
        if outside:
            figure.text(
                0.995,
                0.02,
                "outside the view (right, up):\n"
                + "\n".join(
                    f"{name} ({x:+.2f}, {y:+.2f})" for name, (x, y) in sorted(outside.items())
                ),
                ha="right",
                va="bottom",
                fontsize=10,
            )
        figure.draw_without_rendering()  # the layout is known only afterwards
        _name_points(axes, points, noise)


def in_view(
    points: Mapping[str, Point], uniform: str, noise: Point
) -> tuple[dict[str, Point], dict[str, Point]]:
    """Return the points to show, and those outside the view.

    Points that are much worse than uniform would crowd the others together.

    Args:
        points: All points by name.
        uniform: The name of the uniform variant.
        noise: Half widths of uniform's interval; points within two of them are shown.
    """
    (x, y), better = points[uniform], [min(values) for values in zip(*points.values(), strict=True)]
    right, top = (
        x + max(0.4 * (x - better[0]), 2 * noise[0]),
        y + max(0.6 * (y - better[1]), 2 * noise[1]),
    )
    if right == x or top == y:  # nothing is better than uniform
        return dict(points), {}
    shown = {name: point for name, point in points.items() if point[0] <= right and point[1] <= top}
    return shown, {name: point for name, point in points.items() if name not in shown}


def _name_points(axes, points: Mapping[str, Point], half_widths: Mapping[str, Point]) -> None:
    """Write names beside their points, covering neither each other nor points and bars.

    Points at one place share a label.
    """
    at = {
        name: tuple(map(float, axes.transData.transform(point))) for name, point in points.items()
    }
    groups: list[list[str]] = []
    for name in sorted(points, key=lambda name: at[name]):
        near = next((group for group in groups if math.dist(at[group[0]], at[name]) < SAME), None)
        groups.append([name]) if near is None else near.append(name)
    inside, taken = axes.get_window_extent(), [(x - 6, y - 6, x + 6, y + 6) for x, y in at.values()]
    for name, (x, y) in at.items():
        far_x, far_y = axes.transData.transform(
            [mean + half for mean, half in zip(points[name], half_widths[name], strict=True)]
        )
        taken += [(2 * x - far_x, y - 2, far_x, y + 2), (x - 2, 2 * y - far_y, x + 2, far_y)]
    for group in groups:
        families = {VARIANTS[name].family for name in group}
        text = "\n".join(", ".join(group[first : first + 3]) for first in range(0, len(group), 3))
        x, y = at[group[0]]
        width, height = 7.0 * max(map(len, text.split("\n"))), 15.0 * (1 + text.count("\n"))
        rectangles = [
            (x + dx, y + dy)
            for far in (9, 22, 38, 56, 76, 100)
            for dx, dy in (
                (far / 2, far / 2),
                (-far / 2 - width, far / 2),
                (far / 2, -far / 2 - height),
                (-far / 2 - width, -far / 2 - height),
                (-width / 2, far),
                (-width / 2, -far - height),
                (far, -height / 2),
                (-far - width, -height / 2),
            )
        ]

        def cost(corner: Point, width=width, height=height) -> float:
            label = (*corner, corner[0] + width, corner[1] + height)
            beyond = (max(inside.x0 - label[0], 0) + max(label[2] - inside.x1, 0)) * height
            return sum(_shared(label, other) for other in taken) + beyond

        left, bottom = min(rectangles, key=cost)
        taken.append((left, bottom, left + width, bottom + height))
        axes.annotate(
            text,
            points[group[0]],
            xytext=(left - x, bottom - y),
            textcoords="offset pixels",
            fontsize=10,
            linespacing=1.1,
            color=COLOURS[families.pop()] if len(families) == 1 else "#333333",
            arrowprops={
                "arrowstyle": "-",
                "color": "#bbbbbb",
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 3,
            },
        )


def _shared(one: Rectangle, other: Rectangle) -> float:
    return max(0.0, min(one[2], other[2]) - max(one[0], other[0])) * max(
        0.0, min(one[3], other[3]) - max(one[1], other[1])
    )
