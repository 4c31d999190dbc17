"""Judgement of the network's measurements: wrong sums, and pairs slower than the others."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sorted.doctor.finding import Finding, fail, first_of, ok, warn

FEWEST_TO_COMPARE = 3
"""With fewer measurements there is no usual speed."""


def format_size(number: int) -> str:
    """Format a size in bytes.

    >>> format_size(2**24)
    '16 MiB'
    """
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:g} {name}"
    return f"{number} B"


def format_speed(bytes_per_second: float) -> str:
    """Format a speed in GB/s."""
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def format_time(seconds: float) -> str:
    """Format a short time in us, or in ms from one millisecond on."""
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def check_sums(figures: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[Finding]:
    """Check that every process received the right numbers.

    Args:
        figures: Measurements, each with operation, bytes, wrong elements, and rank.
        names: Names of ranks, with their hosts.
    """
    wrong = [figure for figure in figures if figure["wrong"]]
    if not wrong:
        processes = len({figure["rank"] for figure in figures})
        return [ok("sums", f"correct: {len(figures)} tensors on {processes} processes")]
    first = wrong[0]
    who = first_of([names[rank] for rank in sorted({figure["rank"] for figure in wrong})], 4)
    operation = f"{first['operation']} of {format_size(first['bytes'])}"
    remedy = (
        "Do not train: a device, its memory, a cable or the communication library is at fault. "
        "Test again without these nodes."
    )
    return [fail("sums", f"{operation}: {first['wrong']} wrong numbers; seen by {who}", remedy)]


def check_all_reduce(figures: Sequence[Mapping[str, Any]], scope: str) -> list[Finding]:
    """Return the latency and speed of all-reduces on the slowest process.

    Args:
        figures: Measurements: bytes, seconds and bytes_per_second.
        scope: The processes that take part.
    """
    small, large = _ends(figures)
    latency = max(figure["seconds"] for figure in small)
    speed = min(figure["bytes_per_second"] for figure in large)
    shown = f"{format_size(small[0]['bytes'])} {format_time(latency)}; "
    shown += f"{format_size(large[0]['bytes'])} {format_speed(speed)}"
    return [ok(f"all-reduce, {scope}", shown)]


def _ends(figures: Sequence[Mapping[str, Any]]) -> tuple[list, list]:
    """Return the measurements of the smallest and of the largest size."""
    sizes = [figure["bytes"] for figure in figures]
    return tuple(
        [figure for figure in figures if figure["bytes"] == size]
        for size in (min(sizes), max(sizes))
    )


def check_messages(
    figures: Sequence[Mapping[str, Any]],
    kind: str,
    names: Mapping[int, str],
    published: float | None,
) -> list[Finding]:
    """Check latency and speed between pairs of processes, and name slow pairs.

    Args:
        figures: Measurements of one kind: bytes, seconds, bytes_per_second, rank and peer.
        kind: "within a node" or "across nodes".
        names: Names of ranks, with their hosts.
        published: Bytes a second that the link should have; None if unknown.
    """
    if not figures:
        return []
    name, (small, large) = f"messages {kind}", _ends(figures)
    latency = statistics.median(figure["seconds"] for figure in small)
    speeds = {
        f"{names[figure['rank']]} - {names[figure['peer']]}": figure["bytes_per_second"]
        for figure in large
    }
    slowest = min(speeds, key=speeds.get)
    shown = (
        f"{len(speeds)} pairs: {format_size(small[0]['bytes'])} {format_time(latency)}, "
        f"{format_size(large[0]['bytes'])} {format_speed(statistics.median(speeds.values()))}; "
        f"slowest: {slowest}, {format_speed(speeds[slowest])}"
    )
    usual = statistics.median(speeds.values())
    slow = [pair for pair in sorted(speeds, key=speeds.get) if speeds[pair] < usual / 2]
    if slow and len(speeds) >= FEWEST_TO_COMPARE:
        listed = ", ".join(f"{pair} {format_speed(speeds[pair])}" for pair in slow[:6])
        below = f"{len(slow)} of {len(speeds)} are below half of the usual {format_speed(usual)}"
        remedy = (
            "Look at the links, cables, adapters and other programs of these hosts, or leave "
            "them out."
        )
        return [warn(name, f"{shown}. {below}: {listed}", remedy)]
    if published is not None and usual < published / 2:
        remedy = (
            "The faster link is not used: look at NVLink or RDMA, adapters, and variables that "
            "switch them off."
        )
        return [warn(name, f"{shown}; the link should do {format_speed(published)}", remedy)]
    return [ok(name, shown)]


def published_across(adapter_gigabits: Sequence[float], local_processes: int) -> float | None:
    """Return the bytes a second that each process of a node can send when all send at once.

    None if the speed of the node's adapters is unknown.

    Args:
        adapter_gigabits: Speed of each adapter of a node in Gb/s.
        local_processes: Number of processes of a node.
    """
    if not adapter_gigabits:
        return None
    return min(max(adapter_gigabits), sum(adapter_gigabits) / local_processes) * 1e9 / 8
