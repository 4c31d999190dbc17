"""Megatron's schedules as lists of passes, and the time of a step from the time of each pass."""

from collections.abc import Sequence
from typing import NamedTuple


class Pass(NamedTuple):
    """One micro-batch through one model chunk, forward or backward."""

    forward: bool
    chunk: int
    micro_batch: int


def passes_of_stage(
    stage: int, num_stages: int, num_chunks: int, num_micro_batches: int
) -> list[Pass]:
    """Return the passes of a stage in a step: 1F1B, or interleaved with several chunks.

    Source: Narayanan et al., arXiv 2104.04473, section 2.2; the number of passes before the first
    backward is that of megatron-core 0.16.

    >>> [("F" if step.forward else "B") + str(step.micro_batch)
    ...  for step in passes_of_stage(0, num_stages=2, num_chunks=1, num_micro_batches=3)]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    group = num_stages if num_chunks > 1 else num_micro_batches
    table = [
        (chunk, micro)
        for first in range(0, num_micro_batches, group)
        for chunk in range(num_chunks)
        for micro in range(first, min(first + group, num_micro_batches))
    ]
    ahead = num_stages - stage - 1
    if num_chunks > 1:
        ahead = 2 * ahead + (num_chunks - 1) * num_stages
    ahead = min(ahead, len(table))
    forwards = [Pass(True, chunk, micro) for chunk, micro in table]
    backwards = [Pass(False, num_chunks - 1 - chunk, micro) for chunk, micro in table]
    order = forwards[:ahead]
    for place in range(len(table) - ahead):
        order += [forwards[ahead + place], backwards[place]]
    return order + backwards[len(table) - ahead :]


class Timing(NamedTuple):
    """The time of a step's passes until the last stage ends, and how long each stage computes."""

    seconds: float
    busy_seconds: tuple[float, ...]


SIMULATED = 6
"""Simulated micro-batches per stage; each further one adds the same time."""


def time_of_passes(
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    message_seconds: float,
    num_micro_batches: int,
) -> Timing:
    """Return the time of the passes of a step.

    Args:
        forward, backward: Seconds of one micro-batch: [stage][chunk].
        message_seconds: Time until a message between stages has arrived.
        num_micro_batches: Number of micro-batches of one data parallel rank.
    """
    stages = len(forward)
    few, more = SIMULATED * stages, (SIMULATED + 2) * stages
    busy = tuple(
        num_micro_batches * (sum(f) + sum(b)) for f, b in zip(forward, backward, strict=True)
    )
    if num_micro_batches <= more:
        return Timing(_simulate(forward, backward, message_seconds, num_micro_batches), busy)
    one, two = (_simulate(forward, backward, message_seconds, count) for count in (few, more))
    return Timing(two + (two - one) / (more - few) * (num_micro_batches - more), busy)


def _simulate(
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    message_seconds: float,
    num_micro_batches: int,
) -> float:
    """Return the seconds of a step, pass by pass; arguments as of ``time_of_passes``."""
    stages, chunks = len(forward), len(forward[0])
    orders = [passes_of_stage(stage, stages, chunks, num_micro_batches) for stage in range(stages)]
    done: dict[tuple[bool, int, int, int], float] = {}
    at, clock = [0] * stages, [0.0] * stages
    last = (stages - 1, chunks - 1)

    def ready(stage: int, step: Pass) -> float | None:
        """Return when the input of a pass has arrived; None if it is not computed yet."""
        if step.forward:
            if (stage, step.chunk) == (0, 0):
                return 0.0
            before = (stage - 1, step.chunk) if stage else (stages - 1, step.chunk - 1)
        else:
            if (stage, step.chunk) == last:
                return 0.0
            before = (stage + 1, step.chunk) if stage + 1 < stages else (0, step.chunk + 1)
        moment = done.get((step.forward, *before, step.micro_batch))
        return None if moment is None else moment + (message_seconds if before[0] != stage else 0.0)

    left = sum(map(len, orders))
    while left:
        moved = False
        for stage, order in enumerate(orders):
            while at[stage] < len(order) and (start := ready(stage, order[at[stage]])) is not None:
                step = order[at[stage]]
                seconds = (forward if step.forward else backward)[stage][step.chunk]
                clock[stage] = max(clock[stage], start) + seconds
                done[(step.forward, stage, step.chunk, step.micro_batch)] = clock[stage]
                at[stage] += 1
                left -= 1
                moved = True
        assert moved, "every stage of the schedule waits for another"
    return max(clock)


def most_alive(order: Sequence[Pass], weight_of_chunk: Sequence[float]) -> float:
    """Return the largest total weight of passes whose forward is done and whose backward is not."""
    alive = most = 0.0
    for step in order:
        alive += weight_of_chunk[step.chunk] if step.forward else -weight_of_chunk[step.chunk]
        most = max(most, alive)
    return most
