"""What a check says: a name, a value, a verdict, and the remedy where something is wrong."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OK, WARN, FAIL = "OK", "WARN", "FAIL"
VERDICTS = (OK, WARN, FAIL)


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: What was looked at; few words.
        value: What was seen.
        verdict: OK; WARN: it works, but slowly, unsafely or not for long; FAIL: it will not work.
        remedy: What to do about it; empty with OK.
    """

    name: str
    value: str
    verdict: str = OK
    remedy: str = ""


def fine(name: str, value: object) -> Finding:
    """Return a finding that nothing need be done about."""
    return Finding(name, str(value))


def doubtful(name: str, value: object, remedy: str) -> Finding:
    """Return a finding that works, but slowly, unsafely or not for long."""
    return Finding(name, str(value), WARN, remedy)


def broken(name: str, value: object, remedy: str) -> Finding:
    """Return a finding that will not work."""
    return Finding(name, str(value), FAIL, remedy)


def worst(findings: Iterable[Finding]) -> str:
    """Return the worst verdict among them."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index, default=OK)


def some(words: Sequence[str], most: int) -> str:
    """Return the first ``most`` words of a list, and how many more there are."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def gibibytes(number: float) -> str:
    """Return a number of bytes for people, in MiB below one GiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
