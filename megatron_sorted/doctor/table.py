"""Findings of one or many hosts as one aligned table, or as JSON."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_sorted.doctor.finding import OK, VERDICTS, Finding, some, worst

SMALLEST_WIDTH = 40
Show = Callable[[Mapping[str, Sequence[Finding]], Sequence[Mapping[str, Any]]], int]
"""Prints findings by host and figures of the network, and returns the exit status."""


@dataclass(frozen=True)
class TableRow:
    """A finding and the hosts that share it."""

    hosts: tuple[str, ...]
    finding: Finding


def merge_hosts(by_host: Mapping[str, Sequence[Finding]]) -> list[TableRow]:
    """Return one row for each finding that differs, in the order of the checks.

    What is fine takes one row whatever the hosts' values: the first host's stands for all.
    """
    order = {
        name: None
        for findings in by_host.values()
        for name in (finding.name for finding in findings)
    }
    rows: dict[str, dict[Finding, list[str]]] = {name: {} for name in order}
    for host, findings in by_host.items():
        for finding in findings:
            rows[finding.name].setdefault(finding, []).append(host)
    merged = []
    for found in rows.values():
        good = {finding: hosts for finding, hosts in found.items() if finding.verdict == OK}
        if len(good) > 1:
            first = next(iter(good))
            hosts = [host for group in good.values() for host in group]
            good = {Finding(first.name, f"{first.value} (on {hosts[0]}; others differ)"): hosts}
        bad = {finding: hosts for finding, hosts in found.items() if finding.verdict != OK}
        merged += [TableRow(tuple(hosts), finding) for finding, hosts in {**good, **bad}.items()]
    return merged


def _where(hosts: Sequence[str], num_hosts: int) -> str:
    if len(hosts) == num_hosts:
        return "all"
    return some(hosts, 3)


def as_text(by_host: Mapping[str, Sequence[Finding]], width: int) -> str:
    """Return the table for people, with a last line that sums up.

    Args:
        by_host: Findings by host.
        width: Width of the screen, in columns.
    """
    rows = merge_hosts(by_host)
    names = max((len(row.finding.name) for row in rows), default=0)
    places = (
        [_where(row.hosts, len(by_host)) for row in rows] if len(by_host) > 1 else [""] * len(rows)
    )
    place_width = max(map(len, places), default=0)
    gap = "  " if place_width else ""
    indent = 4 + 2 + names + 2 + place_width + len(gap)
    room = max(SMALLEST_WIDTH, width - indent)
    lines = []
    for row, place in zip(rows, places, strict=True):
        found = row.finding
        text = textwrap.wrap(found.value, room, break_on_hyphens=False) or [""]
        remedy = (
            textwrap.wrap(
                f"-> {found.remedy}", room, subsequent_indent="   ", break_on_hyphens=False
            )
            if found.remedy
            else []
        )
        head = f"{found.verdict:4}  {found.name:{names}}  {place:{place_width}}{gap}"
        lines += [head + text[0], *(" " * indent + line for line in [*text[1:], *remedy])]
    return "\n".join([*(line.rstrip() for line in lines), summary(rows)])


def summary(rows: Sequence[TableRow]) -> str:
    """Return how many rows there are of each verdict, in words."""
    count = {verdict: sum(row.finding.verdict == verdict for row in rows) for verdict in VERDICTS}
    ok, warn, fail = (count[verdict] for verdict in VERDICTS)
    return f"{ok} fine, {warn} doubtful, {fail} that will not work"


def as_data(
    by_host: Mapping[str, Sequence[Finding]], figures: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the same as plain data for JSON: verdict, hosts, every finding of every host, figures of the network."""
    return {
        "verdict": worst(finding for findings in by_host.values() for finding in findings),
        "hosts": list(by_host),
        "findings": [
            {"host": host, **asdict(finding)}
            for host, findings in by_host.items()
            for finding in findings
        ],
        "network": [dict(figure) for figure in figures],
    }
