"""Finds the ranks that hold the others up, from the last heartbeat of every rank."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heartbeat:
    """The state that one rank reports of itself.

    Attributes:
        rank, host, process: The process that sent it.
        beat: A count that grows while the process runs at all, whatever its main thread does.
        mark: A count of phases of work; ranks that work together pass the same marks.
        phase: The main thread's work since the last mark, such as "step 17, forward-backward".
        place: The main thread's place in the code.
        waits: Whether it waits there for other ranks.
    """

    rank: int
    host: str
    process: int
    beat: int
    mark: int
    phase: str
    place: str
    waits: bool

    def __str__(self) -> str:
        """Return the rank with its host and process."""
        return f"rank {self.rank} ({self.host}, process {self.process})"


def find_culprits(
    earlier: Mapping[int, Heartbeat], now: Mapping[int, Heartbeat], world_size: int
) -> tuple[list[int], str]:
    """Return the ranks that hold the others up, and a sentence that says why they are suspected.

    Args:
        earlier: The heartbeats by rank, read some beats ago.
        now: The heartbeats by rank, read now.
        world_size: Number of ranks.
    """
    missing = [rank for rank in range(world_size) if rank not in now]
    if missing:
        return missing, f"{_ranks(missing)} never sent a heartbeat"
    silent = [rank for rank in now if rank in earlier and now[rank].beat <= earlier[rank].beat]
    if silent:
        return silent, _join(
            f"{now[rank]} is silent (stopped, dead or cut off), last seen in {now[rank].phase}"
            for rank in silent
        )
    furthest = max(heartbeat.mark for heartbeat in now.values())
    behind = [rank for rank, heartbeat in now.items() if heartbeat.mark < furthest]
    busy = [rank for rank in behind or now if not now[rank].waits]
    if busy and (behind or len(busy) < world_size):
        return busy, _join(
            f"{now[rank]} does not come out of {now[rank].phase}, at {now[rank].place}"
            for rank in busy
        )
    if behind:
        return behind, _join(
            f"{now[rank]} is behind the others, in {now[rank].phase}, at {now[rank].place}"
            for rank in behind
        )
    return [], "every rank waits for the others: " + _join(
        f"rank {rank} in {heartbeat.phase}, at {heartbeat.place}" for rank, heartbeat in now.items()
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _join(sentences: Iterable[str], limit: int = 4) -> str:
    """Join the first ``limit`` sentences and count the others."""
    listed = list(sentences)
    more = f"; and {len(listed) - limit} more" if len(listed) > limit else ""
    return "; ".join(listed[:limit]) + more
