"""The picture of runs: panels of curves over steps, over depth and over operations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

from megatron_sorted.reporting.drawing import COLOURS, MARKERS, TITLED, figure_of
from megatron_sorted.reporting.run_reports import Curve, RecordedRun

RUN_LINES = ("-", "--", ":", "-.", (0, (7, 2, 1, 2, 1, 2)), (0, (1, 3)))
MAX_RUNS = len(COLOURS)
SET_LINES = ("-", ":", "--", "-.")
MANY_DEPTHS = 8
"""Largest number of depths in a legend; for more there is a colour bar."""
WIDE, HIGH = 15.0, 4.6
"""Width of the picture and height of a row of panels, in inches."""


@dataclass(frozen=True)
class Panel:
    """One panel of the picture.

    Attributes:
        title: The panel's title.
        draw: A function that draws the panel into axes.
        wide: Whether the panel takes the whole width.
    """

    title: str
    draw: Callable
    wide: bool = False


def smooth(curve: Curve, reach: int) -> Curve:
    """Return the mean over ``reach`` points on either side, fewer near the ends.

    The window is symmetric everywhere, so that a falling curve is not shifted.

    >>> smooth(Curve([1, 2, 3], [3.0, 0.0, 3.0]), 1).values
    [3.0, 2.0, 3.0]
    """
    sums = list(accumulate(curve.values, initial=0.0))
    values = []
    for i in range(len(curve.values)):
        near = min(reach, i, len(curve.values) - 1 - i)
        values.append((sums[i + near + 1] - sums[i - near]) / (2 * near + 1))
    return Curve(curve.steps, values)


def reach_of(points: int) -> int:
    """Return the number of points on either side for `smooth`; 0, no smoothing, for few points."""
    return points // 50


def depth_colours(depths: Sequence[int]) -> dict[int, tuple]:
    """Return a colour for every depth: light for shallow, dark for deep.

    Colour-blind readers can distinguish them, also in grey.
    """
    from matplotlib import colormaps

    scale = colormaps["viridis_r"]
    first, last = min(depths), max(depths)
    # without the lightest yellow, which is invisible on white
    return {
        depth: scale(0.15 + 0.85 * ((depth - first) / (last - first) if last > first else 1.0))
        for depth in depths
    }


def panels_of(runs: Sequence[RecordedRun]) -> list[Panel]:
    """Return the panels for which the runs have numbers."""
    depths = sorted({depth for run in runs for depth in run.depths})
    colours = depth_colours(depths)
    panels = []
    if any(run.train or run.evaluations for run in runs):
        panels.append(
            Panel("Loss of every exit", lambda axes: _loss(axes, runs, colours), wide=True)
        )
    panels.append(Panel(f"Loss over depth, {_where(runs)}", lambda axes: _over(axes, runs, None)))
    if any(run.costs for run in runs):
        panels.append(
            Panel(
                "Loss over forward operations of the sub-model",
                lambda axes: _over(axes, runs, "flops_per_token"),
            )
        )
    for number, title in (
        ("agreement", "Agreement with the last exit (share of tokens)"),
        ("accept_length", "Accept length when the exit drafts (tokens per verification)"),
        ("grad_norm", "Gradient norm of the exit's own loss"),
    ):
        if any(run.exit_curve(depth, number).values for run in runs for depth in run.depths):
            panels.append(
                Panel(title, lambda axes, number=number: _per_exit(axes, runs, colours, number))
            )
    for number, title in (
        ("learning_rate", "Learning rate"),
        ("grad_norm", "Gradient norm before clipping"),
    ):
        if any(run.curve(number).values for run in runs):
            panels.append(Panel(title, lambda axes, number=number: _training(axes, runs, number)))
    return panels


def draw(runs: Sequence[RecordedRun], output: Path) -> None:
    """Write the picture of these runs as PNG."""
    panels = panels_of(runs)
    narrow = [panel for panel in panels if not panel.wide]
    wide = [panel for panel in panels if panel.wide]
    rows = len(wide) + (len(narrow) + 1) // 2
    style = TITLED | {"font.size": 12, "axes.titlesize": 13, "axes.edgecolor": "black"}
    with figure_of(output, WIDE, HIGH * rows, style, dpi=110) as figure:
        figure.get_layout_engine().set(h_pad=0.15, w_pad=0.15)
        grid = figure.add_gridspec(rows, 2)
        places = [grid[row, :] for row in range(len(wide))] + [
            grid[len(wide) + i // 2, i % 2] for i in range(len(narrow))
        ]
        if len(narrow) % 2:
            places[-1] = grid[-1, :]
        for panel, place in zip([*wide, *narrow], places, strict=True):
            axes = figure.add_subplot(place)
            panel.draw(axes)
            axes.set_title(panel.title, pad=10)
            axes.grid(color="#e4e4e4", linewidth=0.8)
            axes.set_axisbelow(True)


def _where(runs: Sequence[RecordedRun]) -> str:
    return "last evaluation" if any(run.evaluations for run in runs) else "last report of training"


def _legend(
    axes, runs: Sequence[RecordedRun], colours: dict[int, tuple], dots: bool = False
) -> None:
    """Add the legend: colours of exits, line styles of runs, dots of evaluations."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.lines import Line2D

    handles = []
    if len(colours) > MANY_DEPTHS:
        depths = sorted(colours)
        edges = [
            depths[0] - 0.5,
            *((below + above) / 2 for below, above in pairwise(depths)),
            depths[-1] + 0.5,
        ]
        bar = axes.figure.colorbar(
            ScalarMappable(
                BoundaryNorm(edges, len(depths)),
                ListedColormap([colours[depth] for depth in depths]),
            ),
            ax=axes,
            pad=0.01,
            aspect=30,
            label="exit after layer",
            spacing="proportional",
        )
        every = -(-len(depths) // 10)
        shown = depths[::-1][::every][::-1]  # with the last one
        bar.set_ticks(shown, labels=[str(depth) for depth in shown])
        bar.minorticks_off()
    else:
        handles += [
            Line2D([], [], color=colour, linewidth=2.5, label=f"exit {depth}")
            for depth, colour in sorted(colours.items())
        ]
    if len(runs) > 1:
        handles += [
            Line2D([], [], color="#444444", linewidth=1.8, linestyle=line, label=run.name)
            for run, line in zip(runs, RUN_LINES, strict=False)
        ]
    if dots:
        handles.append(
            Line2D(
                [],
                [],
                color="#444444",
                marker="o",
                linestyle="",
                markersize=5,
                label=f"evaluation: {_first_set(runs)}",
            )
        )
    if handles:
        axes.legend(handles=handles, frameon=False, ncols=-(-len(handles) // 8), fontsize=11)


def _first_set(runs: Sequence[RecordedRun]) -> str:
    return next((name for run in runs for name in run.evaluations), "").removesuffix(
        "_text_document"
    )


def _loss(axes, runs: Sequence[RecordedRun], colours: dict[int, tuple]) -> None:
    tops, bottoms, dots, few = [], [], False, len(colours) <= MANY_DEPTHS
    for run, line, marker in zip(runs, RUN_LINES, MARKERS, strict=False):
        for depth in run.depths:
            raw = run.exit_curve(depth, "loss")
            if raw.values:
                mean = smooth(raw, reach_of(len(raw.values)))
                if reach_of(len(raw.values)):
                    axes.plot(raw.steps, raw.values, color=colours[depth], linewidth=0.7, alpha=0.3)
                axes.plot(
                    mean.steps,
                    mean.values,
                    color=colours[depth],
                    linewidth=1.8,
                    linestyle=line,
                    marker="o" if len(mean.values) == 1 else None,
                )
                # the fall of the first steps would flatten the rest of the curve
                tops.append(mean.values[min(len(mean.values) - 1, max(1, len(mean.values) // 25))])
                bottoms.append(min(mean.values))
            name = next(iter(run.evaluations), None)
            if name is not None and (curve := run.exit_curve(depth, "loss", name)).values:
                axes.scatter(
                    curve.steps,
                    curve.values,
                    color=[colours[depth]],
                    s=26 if few else 10,
                    zorder=3,
                    edgecolors="white",
                    linewidths=0.6 if few else 0.0,
                    marker=marker,
                )
                dots = True
                bottoms.append(min(curve.values))
                if not raw.values:
                    tops.append(max(curve.values))
    if tops:
        low, high = min(bottoms), max(tops)
        if low > 0 and high > 20 * low:  # the model has memorized its data
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(low - 0.04 * (high - low or 1.0), high + 0.04 * (high - low or 1.0))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.margins(x=0.01)
    _legend(axes, runs, colours, dots)


def _over(axes, runs: Sequence[RecordedRun], cost: str | None) -> None:
    """Draw the loss over depth, or over a cost of the sub-model."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    sets = list(dict.fromkeys(name for run in runs for name in run.evaluations)) or [None]
    for run, colour, marker in zip(runs, COLOURS, MARKERS, strict=False):
        own = [name for name in sets if name in run.evaluations] or [None]
        for name in own:
            if name is None and not run.train:
                continue
            losses = {
                depth: numbers["loss"]
                for depth, numbers in run.final(name)[1].items()
                if numbers["loss"] is not None
            }
            if cost is not None:
                losses = {
                    run.costs[depth][cost]: loss
                    for depth, loss in losses.items()
                    if depth in run.costs
                }
            label = " / ".join(
                [run.name] * (len(runs) > 1) + [(name or "training").removesuffix("_text_document")]
            )
            line = SET_LINES[sets.index(name) % len(SET_LINES)] if name in sets else "-"
            if losses:
                axes.plot(
                    list(losses),
                    list(losses.values()),
                    color=colour,
                    marker=marker,
                    linewidth=2,
                    markersize=6,
                    linestyle=line,
                    label=label,
                )
    if cost is None:
        axes.set_xlabel("layers run")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xlabel("forward FLOPs per token")
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_ylabel("loss (nats per token)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=11)


def _per_exit(axes, runs: Sequence[RecordedRun], colours: dict[int, tuple], number: str) -> None:
    for run, line in zip(runs, RUN_LINES, strict=False):
        # the last exit always agrees with itself
        for depth in run.depths if number == "grad_norm" else run.depths[:-1]:
            raw = run.exit_curve(depth, number)
            mean = smooth(raw, reach_of(len(raw.values)))
            axes.plot(mean.steps, mean.values, color=colours[depth], linewidth=1.8, linestyle=line)
    axes.set_xlabel("step; colours as above")


def _training(axes, runs: Sequence[RecordedRun], number: str) -> None:
    top = 0.0
    for run, colour, line in zip(runs, COLOURS, RUN_LINES, strict=False):
        raw = run.curve(number)
        if number == "grad_norm" and reach_of(len(raw.values)):
            axes.plot(raw.steps, raw.values, color=colour, linewidth=0.7, alpha=0.3)
            raw_top = sorted(raw.values)[int(0.99 * len(raw.values))]
            reach = reach_of(len(raw.values))
            # unlike a mean, the median does not rise around a single spike
            raw = Curve(
                raw.steps,
                [
                    median(raw.values[max(0, i - reach) : i + reach + 1])
                    for i in range(len(raw.values))
                ],
            )
            top = max(top, raw_top)
        axes.plot(
            raw.steps, raw.values, color=colour, linewidth=1.8, linestyle=line, label=run.name
        )
    if top:
        axes.set_ylim(0, 1.1 * top)  # single spikes may leave the panel
    else:
        axes.set_ylim(bottom=0)
    if number == "learning_rate":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
    axes.set_xlabel("step")
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=11)
