"""The picture of losses by position: a row for each text, a panel for each model."""

from pathlib import Path
from typing import Any

from megatron_sorted.reporting.drawing import MARKERS, TITLED, figure_of

WIDE, HIGH = 7.0, 5.0
"""Width and height of a panel in inches."""


def draw_positions(results: dict, output: Path) -> None:
    """Write the picture as PNG: a line for each exit, over the last position of each bucket."""
    lasts = [last for _, last in results["settings"]["positions"]["buckets"]]
    texts = results["positions"]
    models = list(results["models"])
    with figure_of(output, WIDE * len(models), HIGH * len(texts), TITLED) as figure:
        grid = figure.subplots(len(texts), len(models), squeeze=False, sharey="row")
        for row, (name, measured) in zip(grid, texts.items(), strict=True):
            row[0].set_ylabel("nats per token")
            for axes, model in zip(row, models, strict=True):
                axes.set_title(f"{name}, {model}", pad=14)
                _draw(axes, lasts, measured["models"][model]["buckets"])
                _mark_trained(axes, lasts[-1], results["models"][model])


def _draw(axes: Any, lasts: list[int], buckets: list[dict]) -> None:
    """Draw the losses of every exit; a shallow one is light, and bands are one standard error."""
    from matplotlib import colormaps

    depths = sorted({depth for exits in buckets for depth in exits})
    for place, depth in enumerate(depths):
        colour = colormaps["viridis_r"](0.15 + 0.85 * (place + 1) / len(depths))
        points = [
            (last, exits[depth]["loss"], exits[depth]["loss_standard_error"] or 0.0)
            for last, exits in zip(lasts, buckets, strict=True)
            if depth in exits
        ]
        x, y, errors = (list(values) for values in zip(*points, strict=True))
        low = [value - error for value, error in zip(y, errors, strict=True)]
        high = [value + error for value, error in zip(y, errors, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(x, y, color=colour, marker=marker, linewidth=2.5, label=f"depth {depth}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lasts[:: -(-len(lasts) // 12)], minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{round(value):,}")
    axes.set_xlabel("position (the last one of each bucket)")
    axes.grid(axis="y", color="#e2e2e2")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)


def _mark_trained(axes: Any, length: int, facts: dict) -> None:
    """Draw a line where the positions end that the model's config names."""
    if facts["max_positions"] < length:
        axes.axvline(facts["max_positions"], color="#555555", linestyle="--", linewidth=1.5)
        axes.annotate(
            "longest of config.json",
            (facts["max_positions"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
            fontsize=11,
            color="#555555",
        )
