"""Copies of numbers to the device for which the host does not wait."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to ``device`` without waiting: from page-locked memory."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def numbers(values: Sequence, device: torch.device) -> Tensor:
    """Return integers, or nested lists of them, as a tensor on ``device``."""
    return to_device(torch.tensor(values, dtype=torch.long), device)


def set_numbers(target_b: Tensor, values: Sequence[int]) -> None:
    """Write these numbers into ``target_b``."""
    if len(set(values)) == 1:
        target_b.fill_(values[0])
    else:
        target_b.copy_(numbers(values, target_b.device))


def slots_from(
    starts: Sequence[int], n: int, device: torch.device, last: Sequence[int] | None = None
) -> Tensor:
    """Return n consecutive slots of each row, [b, n], limited to at most ``last``."""
    if len(set(starts)) == 1:
        slots = torch.arange(starts[0], starts[0] + n, device=device).expand(len(starts), n)
    else:
        slots = numbers(starts, device)[:, None] + torch.arange(n, device=device)
    if last is None or all(start + n <= end + 1 for start, end in zip(starts, last, strict=True)):
        return slots
    return torch.minimum(slots, numbers(last, device)[:, None])
