"""Time and correctness of sums and messages, in fp32 with numbers whose sums are exact."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

PERIOD = 256
"""Numbers stay below it: sums over 4096 processes are below 2^24, up to which fp32 is exact."""
TRIAL_SECONDS, MAX_REPEATS = 0.5, 20
FLOAT_BYTES = 4


@dataclass
class Meter:
    """A timer of operations that all processes begin together.

    Attributes:
        device: The device that holds the tensors.
        synchronize: A function that waits for it.
        host_group: All processes, for tensors in host memory.
        budget_seconds: Time left for measurements; equal on all processes, which agree on its use.
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

    def time(
        self, operation: Callable[[], Any], count_wrong: Callable[[], int]
    ) -> tuple[float, int]:
        """Return an operation's seconds on this process, and the wrong elements of its first run.

        The first run is not timed.

        Collective: the operation a few times, and four all-reduces of 8 bytes over all processes.

        Args:
            operation: The operation; it does nothing on processes that only wait.
            count_wrong: Counts wrong elements; called once after the first run.
        """
        self.slowest(0.0)
        operation()
        self.synchronize()
        wrong = count_wrong()
        first = self.slowest(self._run(operation, 1))
        repeats = max(1, min(MAX_REPEATS, int(TRIAL_SECONDS / max(first, 1e-9))))
        self.slowest(0.0)
        seconds = self._run(operation, repeats)
        self.budget_seconds -= first * (2 + repeats)
        return seconds, wrong

    def _run(self, operation: Callable[[], Any], repeats: int) -> float:
        self.synchronize()
        began = time.monotonic()
        for _ in range(repeats):
            operation()
        self.synchronize()
        return (time.monotonic() - began) / repeats

    def pattern(self, count: int) -> torch.Tensor:
        """Return ``count`` whole numbers from 0 to 255 in turn."""
        return (torch.arange(count, device=self.device) % PERIOD).to(torch.float32)


def count_different(result: torch.Tensor, expected: torch.Tensor) -> int:
    """Count the elements that differ from the expected ones; NaN always does."""
    return int((result != expected).sum().item())


def measure_all_reduce(
    sizes: Sequence[int], rank: int, size: int, meter: Meter
) -> list[dict[str, Any]]:
    """Measure all-reduces: seconds, bytes a second over the slowest link, wrong elements.

    On a ring, twice (size - 1) / size of the bytes pass the slowest link. Sizes that would take
    longer than the meter's budget are left out.

    Collective: all-reduces over all processes.

    Args:
        sizes: Bytes of the tensor, increasing.
        rank: Rank of this process.
        size: Number of processes.
        meter: This process's meter.
    """
    figures: list[dict[str, Any]] = []
    slowest = 0.0
    for number, total in enumerate(sizes):
        if number and slowest * total / sizes[number - 1] * 4 > meter.budget_seconds:
            break
        count = max(size, total // FLOAT_BYTES)
        tensor = meter.pattern(count) + rank
        expected = meter.pattern(count) * size + size * (size - 1) // 2

        def operation(tensor=tensor) -> None:
            """Sum over all processes.

            Collective: one all-reduce.
            """
            dist.all_reduce(tensor)

        def count_wrong(tensor=tensor, expected=expected) -> int:
            wrong = count_different(tensor, expected)
            tensor.zero_()  # sums of sums would overflow
            return wrong

        seconds, wrong = meter.time(operation, count_wrong)
        slowest = meter.slowest(seconds)
        link_bytes = total * 2 * (size - 1) / size
        figures.append(_figure("all-reduce", total, seconds, wrong, link_bytes))
    return figures


def measure_messages(
    sizes: Sequence[int], rank: int, peer: int | None, meter: Meter
) -> list[dict[str, Any]]:
    """Measure messages to and from another process: seconds in one direction, wrong elements.

    Collective: all processes; those without a peer only wait. Messages use the default group.

    Args:
        sizes: Bytes of a message.
        rank: This process's rank.
        peer: Rank of the other process; None: none in this round.
        meter: This process's meter.
    """
    figures = []
    for total in sizes:
        if peer is None:
            meter.time(lambda: None, lambda: 0)
            continue
        count = total // FLOAT_BYTES
        sent, received = meter.pattern(count) + rank, torch.empty(count, device=meter.device)
        expected = meter.pattern(count) + peer

        def exchange(sent=sent, received=received) -> None:
            """Exchange tensors; the lower rank sends first.

            Collective: two messages between the two.
            """
            steps = [lambda: dist.send(sent, peer), lambda: dist.recv(received, peer)]
            for step in steps if rank < peer else reversed(steps):
                step()

        def count_wrong(received=received, expected=expected) -> int:
            return count_different(received, expected)

        seconds, wrong = meter.time(exchange, count_wrong)
        figures.append(_figure("message", total, seconds / 2, wrong, total))
    return figures


def _figure(
    operation: str, size: int, seconds: float, wrong: int, link_bytes: float
) -> dict[str, Any]:
    return {
        "operation": operation,
        "bytes": size,
        "seconds": seconds,
        "wrong": wrong,
        "bytes_per_second": link_bytes / seconds,
    }
