"""The picture of PosGen: accuracy over the position, a panel for each task and exit."""

from pathlib import Path

from lab.posgen_task.outcomes import NAMES, Outcomes
from lab.posgen_task.plan import LENGTH
from megatron_sorted.reporting.drawing import COLOURS, MARKERS, TITLED, figure_of

WIDE, HIGH = 7.0, 4.0
"""Width and height of a panel in inches."""


def draw(outcomes: Outcomes, output: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.ticker import PercentFormatter

    rows, columns = len(outcomes.tasks), len(outcomes.depths)
    with figure_of(output, WIDE * columns, HIGH * rows, TITLED) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for line, task in zip(grid, outcomes.tasks, strict=True):
            for axes, depth in zip(line, outcomes.depths, strict=True):
                for name, colour, marker in zip(NAMES, COLOURS, MARKERS, strict=True):
                    x, y = outcomes.curve(task, name, depth)
                    axes.plot(x, y, color=colour, marker=marker, linewidth=2, label=name)
                axes.axvline(LENGTH, color="#555555", linestyle="--")
                axes.set_title(f"{task}, exit {depth}")
                axes.set_ylim(0, 1.03)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
                axes.grid(axis="y", color="#e2e2e2")
                axes.set_axisbelow(True)
            line[0].set_ylabel("next number predicted")
        for axes in grid[-1]:
            axes.set_xlabel(f"numbers before it (trained up to {LENGTH})")
        grid[0][-1].legend(frameon=False, fontsize=11)
