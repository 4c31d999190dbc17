"""Findings of one or many hosts as one aligned table, or as JSON."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_sorted.doctor.finding import OK, VERDICTS, Finding, first_of, worst

SMALLEST_WIDTH = 40
Show = Callable[[Mapping[str, Sequence[Finding]], Sequence[Mapping[str, Any]]], int]
"""A function that prints findings by host and measurements, and returns the exit status."""


@dataclass(frozen=True)
class TableRow:
    """A finding and the hosts that share it."""

    hosts: tuple[str, ...]
    finding: Finding


def merge_hosts(by_host: Mapping[str, Sequence[Finding]]) -> list[TableRow]:
    """Return one row for each distinct finding, in the order of the checks.

    Findings that are OK share one row, which shows the first host's value.
    """
    hosts_of: dict[str, dict[Finding, list[str]]] = {}
    for host, findings in by_host.items():
        for finding in findings:
            hosts_of.setdefault(finding.name, {}).setdefault(finding, []).append(host)
    rows = []
    for by_finding in hosts_of.values():
        good = {finding: hosts for finding, hosts in by_finding.items() if finding.verdict == OK}
        if len(good) > 1:
            first = next(iter(good))
            hosts = [host for group in good.values() for host in group]
            good = {Finding(first.name, f"{first.value} (on {hosts[0]}; others differ)"): hosts}
        bad = {finding: hosts for finding, hosts in by_finding.items() if finding.verdict != OK}
        rows += [TableRow(tuple(hosts), finding) for finding, hosts in {**good, **bad}.items()]
    return rows


def as_text(by_host: Mapping[str, Sequence[Finding]], width: int) -> str:
    """Return the table as text; its last line counts the verdicts.

    Args:
        by_host: Findings by host.
        width: Width of the screen, in columns.
    """
    rows, num_hosts = merge_hosts(by_host), len(by_host)
    name_width = max((len(row.finding.name) for row in rows), default=0)
    # The column of hosts is left out for a single host.
    places = ["all" if len(row.hosts) == num_hosts else first_of(row.hosts, 3) for row in rows]
    place_width = max(map(len, places), default=0) + 2 if num_hosts > 1 else 0
    indent = 4 + 2 + name_width + 2 + place_width
    space = max(SMALLEST_WIDTH, width - indent)
    lines = []
    for row, place in zip(rows, places, strict=True):
        finding = row.finding
        text = textwrap.wrap(finding.value, space, break_on_hyphens=False) or [""]
        if finding.remedy:
            text += textwrap.wrap(
                f"-> {finding.remedy}", space, subsequent_indent="   ", break_on_hyphens=False
            )
        place = f"{place:{place_width}}" if place_width else ""
        lines.append(f"{finding.verdict:4}  {finding.name:{name_width}}  {place}{text[0]}".rstrip())
        lines += [" " * indent + line for line in text[1:]]
    count = [sum(row.finding.verdict == verdict for row in rows) for verdict in VERDICTS]
    lines.append("{} fine, {} doubtful, {} that will not work".format(*count))
    return "\n".join(lines)


def as_data(
    by_host: Mapping[str, Sequence[Finding]], figures: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return data for JSON: worst verdict, hosts, findings of every host, measurements."""
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
