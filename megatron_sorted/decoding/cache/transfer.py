"""Numbers on their way to the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on ``device``; the host does not wait, as it would for a copy from memory that is not page-locked."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def numbers(values: Sequence, device: torch.device) -> Tensor:
    """Return whole numbers, or lists of them, on ``device``; the host does not wait."""
    return to_device(torch.tensor(values, dtype=torch.long), device)


def set_numbers(target_b: Tensor, values: Sequence[int]) -> None:
    """Write these numbers into ``target_b``; the host does not wait."""
    if len(set(values)) == 1:
        target_b.fill_(values[0])
    else:
        target_b.copy_(numbers(values, target_b.device))


def slots_from(
    starts: Sequence[int], n: int, device: torch.device, last: Sequence[int] | None = None
) -> Tensor:
    """Return n slots [b, n] of each row from its start on, none behind ``last``; the host does not wait."""
    if len(set(starts)) == 1:
        slots = torch.arange(starts[0], starts[0] + n, device=device).expand(len(starts), n)
    else:
        slots = numbers(starts, device)[:, None] + torch.arange(n, device=device)
    if last is None or all(start + n <= end + 1 for start, end in zip(starts, last, strict=True)):
        return slots
    return torch.minimum(slots, numbers(last, device)[:, None])
