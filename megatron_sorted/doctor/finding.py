"""Findings: what a check saw, its verdict, and the remedy where something is wrong."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OK, WARN, FAIL = "OK", "WARN", "FAIL"
VERDICTS = (OK, WARN, FAIL)


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: The subject of the check, in few words.
        value: The observed state.
        verdict: OK; WARN: it works, but slowly, unsafely or not for long; FAIL: it will not work.
        remedy: The action to take; empty with OK.
    """

    name: str
    value: str
    verdict: str = OK
    remedy: str = ""


def ok(name: str, value: object) -> Finding:
    """Return a finding that needs no action."""
    return Finding(name, str(value))


def warn(name: str, value: object, remedy: str) -> Finding:
    """Return a finding for what works, but slowly, unsafely or not for long."""
    return Finding(name, str(value), WARN, remedy)


def fail(name: str, value: object, remedy: str) -> Finding:
    """Return a finding for what will not work."""
    return Finding(name, str(value), FAIL, remedy)


def worst(findings: Iterable[Finding]) -> str:
    """Return the worst verdict among findings; OK if there are none."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index, default=OK)


def first_of(items: Sequence[str], most: int) -> str:
    """Join the first ``most`` items, and append the number of further ones.

    >>> first_of(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")


def format_bytes(number: float) -> str:
    """Format a number of bytes in GiB, or in MiB below one GiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
