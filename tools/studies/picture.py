"""The picture of a study: every variant as a point, full model against all depths, with the front that static weights trace."""

from pathlib import Path

from .outcomes import Outcomes, front
from .variants import FAMILIES, VARIANTS

COLOURS = {"static": "#555555", "learned": "#0072B2", "schedule": "#E69F00", "gradient": "#009E73", "distillation": "#D55E00",
           "teacher": "#56B4E9", "capacity": "#CC79A7", "combined": "#000000", "longer": "#7A5C00"}
"""Okabe and Ito's."""


def draw(outcomes: Outcomes, title: str, output: Path) -> None:
    """Writes a PNG of 1300 x 850 points: gap of the full model to the right, mean gap over depths upwards; bars are 95 % intervals."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
             "axes.titleweight": "bold", "axes.titlesize": 14, "axes.edgecolor": "#555555"}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(13, 8.5), dpi=100, layout="constrained")
        points = {name: (outcomes.full_gap(name), outcomes.mean_gap(name)) for name in outcomes.nested}
        static = front([(points[name][0].value, points[name][1].value) for name in points if VARIANTS[name].family == "static"])
        axes.plot(*zip(*static, strict=True), color=COLOURS["static"], linewidth=1.5, linestyle="--", zorder=1)
        for family in FAMILIES:
            names = [name for name in points if VARIANTS[name].family == family]
            if not names:
                continue
            axes.errorbar([points[name][0].value for name in names], [points[name][1].value for name in names],
                          [points[name][1].half_width or 0 for name in names], [points[name][0].half_width or 0 for name in names],
                          fmt="o", color=COLOURS[family], markersize=7, elinewidth=0.8, capsize=2, label=FAMILIES[family], zorder=3)
        uniform = points[outcomes.uniform]
        axes.axvline(uniform[0].value, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.axhline(uniform[1].value, color="#bbbbbb", linewidth=0.8, zorder=0)
        _name_points(axes, {name: (full.value, mean.value) for name, (full, mean) in points.items()})
        axes.set_title(title, pad=14)
        axes.set_xlabel("gap of the full model, nats a token (nested - trained separately); left is better")
        axes.set_ylabel("mean gap over all depths, nats a token; down is better")
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc="upper right")
        axes.margins(0.08)
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = output.with_name(f".{output.name}.writing")
        figure.savefig(aside, format="png")
        pyplot.close(figure)
    aside.replace(output)


def _name_points(axes, points: dict[str, tuple[float, float]]) -> None:
    """Writes names beside their points, above or below so that near neighbours do not cover each other."""
    axes.figure.canvas.draw()
    placed: list[tuple[float, float, float, float]] = []
    for name, point in sorted(points.items(), key=lambda item: item[1]):
        x, y = axes.transData.transform(point)
        width, height = 7.2 * len(name) * axes.figure.dpi / 100, 15.0
        options = [(x + dx if right else x - dx - width, y + dy) for dy in (4, -14, 18, -28, 32, -42, 46, -56, 60, -70) for dx in (7,)
                   for right in (True, False)]

        def covered(corner, width=width, height=height) -> int:
            left, bottom = corner
            return sum(left < r and other_left < left + width and bottom < t and b < bottom + height for other_left, b, r, t in placed)

        left, bottom = min(options, key=covered)
        placed.append((left, bottom, left + width, bottom + height))
        axes.annotate(name, point, xytext=axes.transData.inverted().transform((left, bottom)), fontsize=10,
                      color=COLOURS[VARIANTS[name].family], arrowprops={"arrowstyle": "-", "color": "#cccccc", "linewidth": 0.6})
