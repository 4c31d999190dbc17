"""The file of all rows: names of columns once, each row a list."""

from collections.abc import Sequence
from typing import Any

from lab.contests.rounds import Row, Store

COLUMNS = (
    "part", "case", "round", "name", "engine", "kind", "strategy", "seconds", "tokens",
    "cpu_seconds", "first", "first_95", "pause", "silence", "texts", "same", "short", "cached",
    "load",
)  # fmt: skip
"""Columns of a row.

part: "throughput", "long prompt" or "prefixes".
case: Number of clients, or of the turn.
seconds, tokens, cpu_seconds: Of the whole turn; processor time of the server.
first, first_95: Seconds to the first token, median and 95 %; of a long prompt, its own.
pause, silence: Longest time between two tokens of a text; the time to the first one included.
texts, same, short: Number of texts, of those equal to texts written alone, of those that ended
    before the wanted length.
cached: Number of the prompt's tokens that were not read; None where the server is silent.
load: The machine's load average before.
"""


class ColumnStore(Store):
    """Rows of equal columns in a file."""

    def __post_init__(self) -> None:
        """Read what an earlier run has left; see `Store`."""
        super().__post_init__()
        columns = self.facts.setdefault("columns", list(COLUMNS))
        self.rows = [dict(zip(columns, row, strict=True)) for row in self.rows]

    def write(self) -> None:
        """Write the file, a line for each row."""
        rows = self.rows
        self.rows = [[row[column] for column in self.facts["columns"]] for row in rows]
        try:
            super().write()
        finally:
            self.rows = rows

    def has(self, **values: Any) -> bool:
        """Return whether a row with these values is kept."""
        return any(all(row[key] == one for key, one in values.items()) for row in self.rows)


def rows_of(rows: Sequence[Row], **values: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[key] == one for key, one in values.items())]
