"""Draft depth x draft length: which exit should draft, and how many tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.benchmark.trials import FULL, full_run, run_of, try_all
from megatron_sorted.decoding.strategies import SelfSpeculative
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.reporting.drawing import drawing
from megatron_sorted.reporting.markdown import table

LENGTHS = (1, 2, 3, 4, 6, 8, 12)


@dataclass(frozen=True)
class Sweep:
    """Self-speculation at every point of a grid.

    Attributes:
        depths, lengths: Of the grid.
        speed_ups: tokens/s over those of full in the same run; [depth][length].
        accepted: New tokens a verification; [depth][length].
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
    writer: TextGenerator,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    lengths: Sequence[int] = LENGTHS,
) -> Sweep:
    """Return the measured grid of every exit and length."""
    depths = writer.network.depths[:-1]
    grid = {
        (depth, length): SelfSpeculative(depth, length) for depth in depths for length in lengths
    }
    runs = full_run(writer, max_new_tokens)
    runs |= {
        f"{depth} {length}": run_of(writer, strategy, max_new_tokens)
        for (depth, length), strategy in grid.items()
    }
    found = try_all(runs, prompts, writer, "depth x length")
    trials = [[found[f"{depth} {length}"] for length in lengths] for depth in depths]
    base = found[FULL].tokens_per_second
    return Sweep(
        depths,
        tuple(lengths),
        [[trial.tokens_per_second / base for trial in row] for row in trials],
        [[trial.tokens_per_step for trial in row] for row in trials],
    )


def sweep_lines(found: Sweep) -> list[str]:
    """Return the section of the page."""
    depth, length, best = found.best
    rows = [
        [
            f"@{depth}",
            *(
                f"{speed:.2f}x, {tokens:.2f}"
                for speed, tokens in zip(speeds, accepted, strict=True)
            ),
        ]
        for depth, speeds, accepted in zip(
            found.depths, found.speed_ups, found.accepted, strict=True
        )
    ]
    return [
        "## Draft depth x draft length",
        "",
        "`self_speculative`: speed-up over `full` in the same run, and tokens a verification.",
        "",
        *table(["draft exit", *(f"{count} tokens" for count in found.lengths)], rows),
        f"Fastest: exit @{depth}, {length} tokens, {best:.2f}x.",
        "",
    ]


def draw_sweep(found: Sweep, title: str, path: Path) -> None:
    """Write a PNG with contours of speed-up and of tokens a verification over the grid; dots are what was measured."""
    depth, length, best = found.best
    columns = range(len(found.lengths))
    with drawing(path, title, 13, 5, 2, sharey=True) as (figure, (left, right)):
        for axes, values, name, colours in (
            (left, found.speed_ups, "speed-up over full", "viridis"),
            (right, found.accepted, "tokens a verification", "cividis"),
        ):
            axes.set_title(name, loc="left")
            if len(found.depths) > 1 and len(found.lengths) > 1:
                filled = axes.contourf(columns, found.depths, values, levels=12, cmap=colours)
                lines = axes.contour(
                    columns,
                    found.depths,
                    values,
                    levels=filled.levels[::2],
                    colors="white",
                    linewidths=0.7,
                )
                axes.clabel(lines, fmt="%.2f", fontsize=8)
                figure.colorbar(filled, ax=axes)
            for row, exit_ in enumerate(found.depths):
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
            axes.set_xticks(list(columns), [str(count) for count in found.lengths])
            axes.set_yticks(found.depths)
            axes.set_xlabel("drafted tokens before a verification")
            axes.set_xlim(-0.5, len(found.lengths) - 0.5)
            axes.set_ylim(found.depths[0] - 0.6, found.depths[-1] + 0.6)
        left.plot(
            found.lengths.index(length),
            depth,
            "*",
            color="#d62728",
            markersize=18,
            label=f"fastest: @{depth}, {length} tokens, {best:.2f}x",
        )
        figure.legend(loc="outside lower right", frameon=False, fontsize=9)
        left.set_ylabel("depth of the exit that drafts")
