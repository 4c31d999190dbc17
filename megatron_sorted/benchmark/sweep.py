"""The speed of self-speculation over draft depth and draft length."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.benchmark.trials import FULL, run_all, run_of
from megatron_sorted.decoding.strategies import Full, SelfSpeculative
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.reporting.drawing import COLOURS, drawing
from megatron_sorted.reporting.markdown import table

LENGTHS = (1, 2, 3, 4, 6, 8, 12)


@dataclass(frozen=True)
class Sweep:
    """Measurements of self-speculation on a grid.

    Attributes:
        depths, lengths: Depths and draft lengths of the grid.
        speed_ups: Ratios to the tokens/s of full in the same run, [depth][length].
        accepted: New tokens per verification, [depth][length].
    """

    depths: tuple[int, ...]
    lengths: tuple[int, ...]
    speed_ups: list[list[float]]
    accepted: list[list[float]]

    @property
    def best(self) -> tuple[int, int, float]:
        """Return depth, length and speed-up of the fastest point."""
        return max(
            (
                (depth, length, self.speed_ups[row][column])
                for row, depth in enumerate(self.depths)
                for column, length in enumerate(self.lengths)
            ),
            key=lambda point: point[2],
        )


def sweep(
    generator: TextGenerator,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    lengths: Sequence[int] = LENGTHS,
) -> Sweep:
    """Measure the grid of every exit before the last layer and every draft length."""
    depths = generator.network.depths[:-1]
    strategies = {FULL: Full()} | {
        f"{depth} {length}": SelfSpeculative(depth, length)
        for depth in depths
        for length in lengths
    }
    runs = {name: run_of(generator, one, max_new_tokens) for name, one in strategies.items()}
    by_name = run_all(runs, prompts, generator, "depth x length")
    trials = [[by_name[f"{depth} {length}"] for length in lengths] for depth in depths]
    base = by_name[FULL].tokens_per_second
    return Sweep(
        depths,
        tuple(lengths),
        [[trial.tokens_per_second / base for trial in row] for row in trials],
        [[trial.tokens_per_step for trial in row] for row in trials],
    )


def sweep_lines(grid: Sweep) -> list[str]:
    """Return the page's section on the sweep."""
    depth, length, best = grid.best
    rows = [
        [
            f"@{depth}",
            *(
                f"{speed:.2f}x, {tokens:.2f}"
                for speed, tokens in zip(speeds, accepted, strict=True)
            ),
        ]
        for depth, speeds, accepted in zip(grid.depths, grid.speed_ups, grid.accepted, strict=True)
    ]
    return [
        "## Draft depth x draft length",
        "",
        "`self_speculative`: speed-up over `full` in the same run, and tokens per verification.",
        "",
        *table(["draft exit", *(f"{count} tokens" for count in grid.lengths)], rows),
        f"Fastest: exit @{depth}, {length} tokens, {best:.2f}x.",
        "",
    ]


def draw_sweep(grid: Sweep, title: str, path: Path) -> None:
    """Write a PNG with contours of speed-up and of tokens per verification; dots are measured."""
    depth, length, best = grid.best
    columns = range(len(grid.lengths))
    with drawing(path, title, 13, 5, 2, sharey=True) as (figure, (left, right)):
        for axes, values, name, colours in (
            (left, grid.speed_ups, "speed-up over full", "viridis"),
            (right, grid.accepted, "tokens per verification", "cividis"),
        ):
            axes.set_title(name, loc="left")
            if len(grid.depths) > 1 and len(grid.lengths) > 1:
                filled = axes.contourf(columns, grid.depths, values, levels=12, cmap=colours)
                lines = axes.contour(
                    columns,
                    grid.depths,
                    values,
                    levels=filled.levels[::2],
                    colors="white",
                    linewidths=0.7,
                )
                axes.clabel(lines, fmt="%.2f", fontsize=8)
                figure.colorbar(filled, ax=axes)
            for row, exit_ in enumerate(grid.depths):
                for column, value in enumerate(values[row]):
                    axes.plot(column, exit_, "o", color="black", markersize=3)
                    axes.annotate(
                        f"{value:.2f}",
                        (column, exit_),
                        xytext=(0, 5),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8,
                    )
            axes.set_xticks(list(columns), [str(count) for count in grid.lengths])
            axes.set_yticks(grid.depths)
            axes.set_xlabel("drafted tokens before a verification")
            axes.set_xlim(-0.5, len(grid.lengths) - 0.5)
            axes.set_ylim(grid.depths[0] - 0.6, grid.depths[-1] + 0.6)
        left.plot(
            grid.lengths.index(length),
            depth,
            "*",
            color=COLOURS[1],
            markersize=18,
            label=f"fastest: @{depth}, {length} tokens, {best:.2f}x",
        )
        figure.legend(loc="outside lower right", frameon=False, fontsize=9)
        left.set_ylabel("depth of the exit that drafts")
