"""How far apart the clocks of nodes are."""

import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine

ROUNDS = 10
DOUBTFUL_SECONDS, BROKEN_SECONDS = 1.0, 300.0


def measure_offset(rank: int, peer: int, group: dist.ProcessGroup | None) -> tuple[float, float]:
    """Return by how many seconds the second rank's clock is ahead of the first's, and how far that may be wrong; (0, 0) on the second.

    Of several round trips the quickest counts: its answer was given within half of it of the middle.

    Collective: two ranks, 2 messages of 8 bytes a round.

    Args:
        rank: This process's rank, one of the two; the smaller one asks.
        peer: The other rank.
        group: A process group for host memory.
    """
    best = (0.0, float("inf"))
    stamp = torch.zeros(1, dtype=torch.float64)
    for _ in range(ROUNDS):
        if rank < peer:
            began = time.time()
            dist.send(stamp, peer, group=group)
            dist.recv(stamp, peer, group=group)
            ended = time.time()
            offset, uncertainty = stamp.item() - (began + ended) / 2, (ended - began) / 2
            best = min(best, (offset, uncertainty), key=lambda pair: pair[1])
        else:
            dist.recv(stamp, peer, group=group)
            stamp[0] = time.time()
            dist.send(stamp, peer, group=group)
    return best if rank < peer else (0.0, 0.0)


def check_offsets(offsets: Mapping[str, Sequence[float]]) -> list[Finding]:
    """Return whether the nodes' clocks agree.

    Args:
        offsets: Seconds each node is ahead of the first, and how far that may be wrong, by the node's name.
    """
    if not offsets:
        return []
    sure = {
        node: max(0.0, abs(ahead) - uncertainty) for node, (ahead, uncertainty) in offsets.items()
    }
    last = max(sure, key=sure.get)
    shown = f"{last} {offsets[last][0] * 1000:+.1f} ms (+-{offsets[last][1] * 1000:.1f}) from the first node"
    far = [node for node, seconds in sure.items() if seconds > DOUBTFUL_SECONDS]
    if far:
        verdict = broken if sure[last] > BROKEN_SECONDS else doubtful
        return [
            verdict(
                "clocks",
                f"{shown}; {len(far)} of {len(offsets)} are off: {', '.join(far[:8])}",
                "Start chronyd or ntpd on these nodes: logs, file times and certificates go by the clock.",
            )
        ]
    return [fine("clocks", f"furthest: {shown}")]
