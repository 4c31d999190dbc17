"""From rows to medians, ratios and the verdict on each target."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lab.contests.contenders import LLAMA, OURS, TRANSFORMERS
from lab.contests.rounds import Row

KIND_PAIRS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
"""Our kind of weights -> llama.cpp's kind of the same precision."""


@dataclass(frozen=True)
class Goal:
    """A ratio that is wanted.

    Attributes:
        part: Letter of the part.
        kind: Our kind of weights.
        peer: The engine that is compared with.
        wanted: Least ratio.
        best: Whether the fastest lossless strategy counts, not `full`.
    """

    part: str
    kind: str
    peer: str
    wanted: float
    best: bool = False

    @property
    def title(self) -> str:
        """Return what is compared."""
        what = {"a": "plain", "b": "prompt of 1,000 tokens", "d": "best lossless strategy"}
        peer = f"{LLAMA} {KIND_PAIRS[self.kind]}" if self.peer == LLAMA else self.peer
        peer += ", the faster of plain and with draft" if self.best and self.peer == LLAMA else ""
        return f"{what[self.part]}, {self.kind} over {peer}"


GOALS = (
    Goal("a", "float32", LLAMA, 1.0),
    Goal("a", "bfloat16", LLAMA, 1.25),
    Goal("a", "int8", LLAMA, 1.1),
    Goal("b", "float32", LLAMA, 0.8),
    Goal("b", "bfloat16", LLAMA, 0.8),
    Goal("b", "int8", LLAMA, 0.8),
    Goal("d", "float32", LLAMA, 1.8, True),
    Goal("d", "bfloat16", LLAMA, 2.2, True),
    Goal("d", "int8", LLAMA, 1.5, True),
    Goal("d", "float32", TRANSFORMERS, 3.0, True),
)


@dataclass(frozen=True)
class Spread:
    """A median over rounds, and the range."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return the spread of some values.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, least=1.0, most=3.0)
        """
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])


def speeds(rows: Sequence[Row], name: str, group: str | None = None) -> dict[int, float]:
    """Return a contender's tokens a second in each round.

    Args:
        rows: Rows of one match.
        name: The contender.
        group: Name of a group of prompts; None for all together: tokens over seconds.
    """
    counts: dict[int, float] = {}
    seconds: dict[int, float] = {}
    for row in rows:
        if row["name"] == name and (group is None or row["group"] == group):
            count = row["prompt_tokens"] if row["part"] == "b" else row["tokens"]
            counts[row["round"]] = counts.get(row["round"], 0.0) + count
            seconds[row["round"]] = seconds.get(row["round"], 0.0) + count / row["speed"]
    return {number: counts[number] / seconds[number] for number in counts}


def ratio(one: dict[int, float], other: dict[int, float]) -> Spread:
    """Return the ratio of two contenders' speeds within each round."""
    return Spread.of(one[number] / other[number] for number in one if number in other)


def names_of(rows: Sequence[Row]) -> list[str]:
    """Return the contenders of a match in the order of its first round."""
    return list(dict.fromkeys(row["name"] for row in rows if row["name"] != "memory"))


def fastest(
    rows: Sequence[Row], engine: str, kind: str, group: str | None = None, plain: bool = False
) -> str | None:
    """Return the fastest contender of an engine and kind by its median; None without one.

    Args:
        rows: Rows of one match.
        engine: The engine.
        kind: Kind of weights as the engine calls it.
        group: See `speeds`.
        plain: Whether only `full` counts.
    """
    names = {
        row["name"]
        for row in rows
        if row.get("engine") == engine
        and row["kind"] == kind
        and (row["strategy"] == "full" or not plain)
    }
    return max(
        sorted(names),
        key=lambda name: statistics.median(speeds(rows, name, group).values()),
        default=None,
    )


@dataclass(frozen=True)
class Verdict:
    """A goal and what was reached.

    Attributes:
        goal: The goal.
        threads, model: Where.
        ours, theirs: Names of the contenders.
        reached: The ratio.
    """

    goal: Goal
    threads: int
    model: str
    ours: str
    theirs: str
    reached: Spread

    @property
    def word(self) -> str:
        """Return "met" or "missed"."""
        return "met" if self.reached.median >= self.goal.wanted else "missed"


def matches_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each match."""
    matches: dict[str, list[Row]] = {}
    for row in rows:
        matches.setdefault(row["match"], []).append(row)
    return matches


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Return a verdict for each goal and each match that it applies to."""
    judged = []
    for goal in GOALS:
        for members in matches_of(rows).values():
            if members[0]["part"] != goal.part:
                continue
            verdict = verdict_of(goal, members)
            if verdict is not None:
                judged.append(verdict)
    return judged


def verdict_of(goal: Goal, rows: Sequence[Row], group: str | None = None) -> Verdict | None:
    """Return the verdict on a goal in one match; None without the two contenders."""
    kind = KIND_PAIRS[goal.kind] if goal.peer == LLAMA else goal.kind
    ours = fastest(rows, OURS, goal.kind, group, not goal.best)
    theirs = fastest(rows, goal.peer, kind, group, not goal.best)
    if ours is None or theirs is None:
        return None
    reached = ratio(speeds(rows, ours, group), speeds(rows, theirs, group))
    return Verdict(goal, rows[0]["threads"], rows[0]["model"], ours, theirs, reached)
