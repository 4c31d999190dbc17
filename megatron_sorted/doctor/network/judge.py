"""What measurements of the network mean: correct or not, how fast, which node or pair is slower than its like."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine, some

# of the usual speed, or of the published one; a link that fell back to a slower one loses more
SHARE_OF_USUAL, SHARE_OF_PUBLISHED = 0.5, 0.5
# with fewer there is no usual speed
FEWEST_TO_COMPARE = 3


def size_words(number: int) -> str:
    """Return a size in bytes for people."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:g} {name}"
    return f"{number} B"


def speed_words(bytes_per_second: float) -> str:
    """Return a speed for people."""
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def time_words(seconds: float) -> str:
    """Return a short time for people."""
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def check_sums(figures: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[Finding]:
    """Return whether every process got the numbers it must get.

    Args:
        figures: Each with operation, bytes, wrong elements, and rank.
        names: Names of ranks, with their hosts.
    """
    wrong = [figure for figure in figures if figure["wrong"]]
    if not wrong:
        return [
            fine(
                "sums",
                f"correct: {len(figures)} tensors on {len({figure['rank'] for figure in figures})} processes",
            )
        ]
    first, ranks = wrong[0], sorted({figure["rank"] for figure in wrong})
    who = some([names[rank] for rank in ranks], 4)
    return [
        broken(
            "sums",
            f"{first['operation']} of {size_words(first['bytes'])}: {first['wrong']} wrong numbers; seen by {who}",
            "Do not train: a device, its memory, a cable or the communication library is at fault. Test again without these nodes.",
        )
    ]


def check_collectives(
    figures: Sequence[Mapping[str, Any]], scope: str, place_of: Mapping[int, str]
) -> list[Finding]:
    """Return the speed of each collective operation in a scope, and the places that are slower than the others.

    Args:
        figures: Those of one scope, each with operation, bytes, seconds, bytes_per_second and rank.
        scope: "all processes" or "within a node".
        place_of: What each rank is measured as part of: its node, or the job.
    """
    found = []
    for operation in dict.fromkeys(figure["operation"] for figure in figures):
        mine = [figure for figure in figures if figure["operation"] == operation]
        smallest, largest = (
            min(figure["bytes"] for figure in mine),
            max(figure["bytes"] for figure in mine),
        )
        latency = max(figure["seconds"] for figure in mine if figure["bytes"] == smallest)
        speeds: dict[str, float] = {}
        for figure in mine:
            if figure["bytes"] == largest:
                place = place_of[figure["rank"]]
                speeds[place] = min(speeds.get(place, float("inf")), figure["bytes_per_second"])
        slowest = min(speeds, key=speeds.get)
        shown = f"{size_words(smallest)} {time_words(latency)}; {size_words(largest)} {speed_words(speeds[slowest])}"
        if len(speeds) > 1:
            shown += f" on the slowest, {slowest}"
        found += _compared(f"{operation}, {scope}", shown, speeds, None)
    return found


def check_messages(
    figures: Sequence[Mapping[str, Any]],
    kind: str,
    names: Mapping[int, str],
    published: float | None,
) -> list[Finding]:
    """Return latency and speed between pairs of processes, the slowest by name, and those slower than their like or than published.

    Args:
        figures: Figures of one kind, each with bytes, seconds, bytes_per_second, rank and peer.
        kind: "within a node" or "across nodes".
        names: Names of ranks, with their hosts.
        published: Bytes a second that the link should have; None if unknown.
    """
    if not figures:
        return []
    smallest, largest = (
        min(figure["bytes"] for figure in figures),
        max(figure["bytes"] for figure in figures),
    )

    def pair(figure: Mapping[str, Any]) -> str:
        return " - ".join(names[rank] for rank in sorted((figure["rank"], figure["peer"])))

    latency = {pair(figure): figure["seconds"] for figure in figures if figure["bytes"] == smallest}
    speeds = {
        pair(figure): figure["bytes_per_second"] for figure in figures if figure["bytes"] == largest
    }
    slowest = min(speeds, key=speeds.get)
    shown = (
        f"{len(speeds)} pairs: {size_words(smallest)} {time_words(statistics.median(latency.values()))}, {size_words(largest)} "
        f"{speed_words(statistics.median(speeds.values()))}; slowest: {slowest}, {speed_words(speeds[slowest])}"
    )
    return _compared(f"messages {kind}", shown, speeds, published)


def _compared(
    name: str, shown: str, speeds: Mapping[str, float], published: float | None
) -> list[Finding]:
    usual = statistics.median(speeds.values())
    slow = [
        place
        for place in speeds
        if len(speeds) >= FEWEST_TO_COMPARE and speeds[place] < SHARE_OF_USUAL * usual
    ]
    if slow:
        listed = ", ".join(
            f"{place} {speed_words(speeds[place])}" for place in sorted(slow, key=speeds.get)[:6]
        )
        return [
            doubtful(
                name,
                f"{shown}. {len(slow)} of {len(speeds)} are below half of the usual {speed_words(usual)}: {listed}",
                "Look at the links, cables, adapters and other programs of these hosts, or leave them out.",
            )
        ]
    if published is not None and usual < SHARE_OF_PUBLISHED * published:
        return [
            doubtful(
                name,
                f"{shown}; the link should do {speed_words(published)}",
                "The faster way is not taken: look at NVLink or RDMA, adapters, and variables that switch them off.",
            )
        ]
    return [fine(name, shown)]


def published_across(adapter_gigabits: Sequence[float], local_processes: int) -> float | None:
    """Return the bytes a second each process of a node can send when all do, by what the node's adapters say; None if unknown."""
    if not adapter_gigabits:
        return None
    return min(max(adapter_gigabits), sum(adapter_gigabits) / local_processes) * 1e9 / 8
