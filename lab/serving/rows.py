"""The columns of a row, and the choice of rows."""

from collections.abc import Sequence
from typing import Any

from lab.contests.rounds import Row

COLUMNS = (
    "match", "case", "round", "name", "engine", "kind", "strategy", "seconds", "tokens",
    "cpu_seconds", "first", "first_95", "pause", "silence", "texts", "same", "short", "cached",
    "load",
)  # fmt: skip
"""Columns of a row.

match: "throughput", "long prompt" or "prefixes".
case: Number of clients, or of the turn.
seconds, tokens, cpu_seconds: Of the whole turn; processor time of the server.
first, first_95: Seconds to the first token, median and 95 %; of a long prompt, its own.
pause, silence: Longest time between two tokens of a text; the time to the first one included.
texts, same, short: Number of texts, of those equal to texts written alone, of those that ended
    before the wanted length.
cached: Number of the prompt's tokens that were not read; None where the server is silent.
load: The machine's load average before.
"""


def rows_of(rows: Sequence[Row], **values: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[key] == one for key, one in values.items())]


def speed(row: Row) -> float:
    """Return the tokens a second of a row."""
    return row["tokens"] / row["seconds"]


def efficiency(row: Row) -> float:
    """Return the tokens a second of processor time."""
    return row["tokens"] / max(row["cpu_seconds"], 0.01)
