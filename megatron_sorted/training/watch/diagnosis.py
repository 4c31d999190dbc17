"""Which rank holds the others up, from what every rank last said of itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """What one rank says of itself.

    Attributes:
        rank, host, process: Who.
        beat: Counts up while the process runs at all, whatever its main thread does.
        mark: Counts phases of work; ranks that work together pass the same marks.
        phase: What the main thread does since the last mark, such as "step 17, forward-backward".
        place: Where in the code it is.
        waits: Whether that is a wait for other ranks.
    """

    rank: int
    host: str
    process: int
    beat: int
    mark: int
    phase: str
    place: str
    waits: bool


def _who(sign: Sign) -> str:
    return f"rank {sign.rank} ({sign.host}, process {sign.process})"


def find_culprits(
    earlier: Mapping[int, Sign], now: Mapping[int, Sign], world_size: int
) -> tuple[list[int], str]:
    """Return the ranks that hold the others up and a sentence that says why they are taken for it.

    Args:
        earlier: The signs by rank, read some beats ago.
        now: The signs by rank, read now.
        world_size: Number of ranks.
    """
    missing = [rank for rank in range(world_size) if rank not in now]
    if missing:
        return missing, f"{_ranks(missing)} never gave a sign"
    silent = [
        rank for rank, sign in now.items() if rank in earlier and sign.beat <= earlier[rank].beat
    ]
    if silent:
        return silent, _join(
            f"{_who(now[rank])} is silent (stopped, dead or cut off), last seen in {now[rank].phase}"
            for rank in silent
        )
    furthest = max(sign.mark for sign in now.values())
    behind = [rank for rank, sign in now.items() if sign.mark < furthest]
    busy = [rank for rank in behind or now if not now[rank].waits]
    if busy and (behind or len(busy) < world_size):
        return busy, _join(
            f"{_who(now[rank])} does not come out of {now[rank].phase}, at {now[rank].place}"
            for rank in busy
        )
    if behind:
        return behind, _join(
            f"{_who(now[rank])} is behind the others, in {now[rank].phase}, at {now[rank].place}"
            for rank in behind
        )
    return [], "every rank waits for the others: " + _join(
        f"rank {sign.rank} in {sign.phase}, at {sign.place}" for sign in now.values()
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _join(sentences, limit: int = 4) -> str:
    listed = list(sentences)
    more = f"; and {len(listed) - limit} more" if len(listed) > limit else ""
    return "; ".join(listed[:limit]) + more
