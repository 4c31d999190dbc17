"""What all tables share: aligned columns with a title and notes, and values with errors."""

from collections.abc import Callable, Container, Sequence
from textwrap import fill

MINUS = (
    "- NAME: difference to that baseline's exit at the same depth, ± one standard error of the "
    "paired difference; below 0 is better for a loss"
)


def align(
    title: str, rows: Sequence[Sequence[str]], breaks: Container[int], notes: Sequence[str]
) -> str:
    """Return a table with its title above and its notes below.

    Args:
        title: The title.
        rows: The cells of every row, the first one with the names of columns; the second column
            begins at the left, others end at the right.
        breaks: Numbers of the rows that stand below a line.
        notes: What the columns mean.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for place, row in enumerate(rows):
        if place in breaks:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
        cells = [
            cell.ljust(width) if at == 1 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(
        [
            title,
            "",
            *lines,
            "",
            *(fill(note, 120, initial_indent="  ", subsequent_indent="      ") for note in notes),
        ]
    )


def error_of(value: float | None, show: Callable[[float], str]) -> str:
    """Return the part of a cell that states a standard error; empty if there is none."""
    return "" if value is None else f" ± {show(value)}"
