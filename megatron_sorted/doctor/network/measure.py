"""Speed and correctness of collective operations and messages, in fp32 with numbers whose sums are exact."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# numbers below 256: sums over 4096 processes stay below 2^24, up to which fp32 holds every whole number
PERIOD = 256
TRIAL_SECONDS, MOST_REPEATS = 0.5, 20
FLOAT_BYTES = 4


@dataclass
class Meter:
    """Times operations that all processes begin together.

    Attributes:
        device: Device on which tensors lie.
        synchronize: Waits for it.
        host_group: All processes, for host memory.
        budget_seconds: Left for measurements; the same on all processes, since it is spent in agreed amounts.
    """

    device: torch.device
    synchronize: Callable[[], None]
    host_group: dist.ProcessGroup | None
    budget_seconds: float

    def slowest(self, seconds: float) -> float:
        """Return the largest of all processes' numbers.

        Collective: one all-reduce of 8 bytes over all processes.
        """
        number = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.host_group)
        return number.item()

    def time(self, operation: Callable[[], None], after_first: Callable[[], None]) -> float:
        """Return the seconds of an operation on this process, after a first run that is not counted.

        Collective: the operation a few times, and four all-reduces of 8 bytes over all processes.

        Args:
            operation: What is timed; nothing at all on processes that only wait.
            after_first: Called once after the first run, outside the measured time.
        """
        self.slowest(0.0)
        operation()
        self.synchronize()
        after_first()
        first = self.slowest(self._run(operation, 1))
        repeats = max(1, min(MOST_REPEATS, int(TRIAL_SECONDS / max(first, 1e-9))))
        self.slowest(0.0)
        seconds = self._run(operation, repeats)
        self.budget_seconds -= first * (2 + repeats)
        return seconds

    def _run(self, operation: Callable[[], None], repeats: int) -> float:
        self.synchronize()
        began = time.monotonic()
        for _ in range(repeats):
            operation()
        self.synchronize()
        return (time.monotonic() - began) / repeats

    def pattern(self, count: int) -> torch.Tensor:
        """Return ``count`` whole numbers from 0 to 255 in turn."""
        return (torch.arange(count, device=self.device) % PERIOD).to(torch.float32)


def differing(got: torch.Tensor, expected: torch.Tensor) -> int:
    """Return how many elements are not what they must be; NaN is none."""
    return int((got != expected).sum().item())


def _all_reduce(
    meter: Meter, count: int, me: int, size: int, group: dist.ProcessGroup | None
) -> tuple[Callable, Callable]:
    """Collective: the operation that is returned, over ``group``."""
    tensor = meter.pattern(count) + me
    expected = meter.pattern(count) * size + size * (size - 1) // 2

    def verify() -> int:
        wrong = differing(tensor, expected)
        tensor.zero_()  # sums of sums would overflow
        return wrong

    return lambda: dist.all_reduce(tensor, group=group), verify


def _all_gather(
    meter: Meter, count: int, me: int, size: int, group: dist.ProcessGroup | None
) -> tuple[Callable, Callable]:
    """Collective: the operation that is returned, over ``group``."""
    piece = meter.pattern(count // size) + me
    tensor = torch.empty(piece.numel() * size, device=meter.device)
    expected = torch.cat([meter.pattern(count // size) + other for other in range(size)])
    return lambda: dist.all_gather_into_tensor(tensor, piece, group=group), lambda: differing(
        tensor, expected
    )


def _reduce_scatter(
    meter: Meter, count: int, me: int, size: int, group: dist.ProcessGroup | None
) -> tuple[Callable, Callable]:
    """Collective: the operation that is returned, over ``group``."""
    length = count // size
    tensor, piece = meter.pattern(length * size) + me, torch.empty(length, device=meter.device)
    expected = (
        meter.pattern(length * size)[me * length : (me + 1) * length] * size
        + size * (size - 1) // 2
    )
    return lambda: dist.reduce_scatter_tensor(piece, tensor, group=group), lambda: differing(
        piece, expected
    )


COLLECTIVES = {
    "all-reduce": (_all_reduce, 2),
    "all-gather": (_all_gather, 1),
    "reduce-scatter": (_reduce_scatter, 1),
}
"""Each with how often (size - 1) / size of its bytes pass the slowest link of a ring."""


def measure_collective(
    name: str,
    sizes: Sequence[int],
    me: int,
    size: int,
    group: dist.ProcessGroup | None,
    meter: Meter,
) -> list[dict[str, Any]]:
    """Return seconds, bytes a second over the slowest link, and wrong elements, for tensors of several sizes in bytes.

    Sizes that would take longer than the meter's budget are left out.

    Collective: the operation on every group that measures at the same time; all processes must take part.

    Args:
        name: One of ``COLLECTIVES``.
        sizes: Bytes of the whole tensor, increasing.
        me: Rank of this process in the group.
        size: Number of processes of the group.
        group: The process group.
        meter: This process's meter.
    """
    prepare, passes = COLLECTIVES[name]
    found, last = [], 0.0
    for number, total in enumerate(sizes):
        if number and last * total / sizes[number - 1] * 4 > meter.budget_seconds:
            break
        operation, verify = prepare(meter, max(size, total // FLOAT_BYTES), me, size, group)
        wrong: list[int] = []
        seconds = meter.time(operation, lambda verify=verify, wrong=wrong: wrong.append(verify()))
        last = meter.slowest(seconds)
        found.append(
            {
                "operation": name,
                "bytes": total,
                "seconds": seconds,
                "wrong": wrong[0],
                "bytes_per_second": total * passes * (size - 1) / size / seconds,
            }
        )
    return found


def measure_messages(
    sizes: Sequence[int], rank: int, peer: int | None, meter: Meter
) -> list[dict[str, Any]]:
    """Return seconds one way, bytes a second and wrong elements of messages to and fro between this process and another.

    Collective: all processes; those without a peer only wait. Messages go over the default group.

    Args:
        sizes: Bytes of a message.
        rank: This process's rank.
        peer: Rank of the other; None: none in this round.
        meter: This process's meter.
    """
    found = []
    for total in sizes:
        count = total // FLOAT_BYTES
        mine, other = meter.pattern(count) + rank, torch.empty(count, device=meter.device)

        def exchange(mine=mine, other=other) -> None:
            """Collective: two messages between the two."""
            if peer is None:
                return
            if rank < peer:
                dist.send(mine, peer)
                dist.recv(other, peer)
            else:
                dist.recv(other, peer)
                dist.send(mine, peer)

        wrong: list[int] = []
        expected = meter.pattern(count) + (peer or 0)
        seconds = (
            meter.time(
                exchange,
                lambda other=other, expected=expected, wrong=wrong: wrong.append(
                    0 if peer is None else differing(other, expected)
                ),
            )
            / 2
        )
        if peer is not None:
            found.append(
                {
                    "operation": "message",
                    "bytes": total,
                    "seconds": seconds,
                    "wrong": wrong[0],
                    "bytes_per_second": total / seconds,
                }
            )
    return found
