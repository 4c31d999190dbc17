"""What the exits of a step (or of an evaluation) said, added up without waiting for the device."""

from dataclasses import dataclass, field

import torch

from megatron_sorted.loss.linear_cross_entropy import ExitLoss


@dataclass
class Ledger:
    """Sums per exit over micro-batches on this rank: loss, label-is-most-likely count, token count, and micro-batch means.

    Attributes:
        sums: Per depth a tensor [loss * mask, correct, tokens, sum of micro-batch means, micro-batches].
    """

    sums: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, depth: int, losses: ExitLoss, loss_mask_n: torch.Tensor) -> None:
        """Adds one micro-batch of the exit at ``depth``."""
        loss = (losses.loss_n * loss_mask_n).sum()
        tokens = loss_mask_n.sum()
        correct = (losses.correct_n * loss_mask_n).sum()
        row = torch.stack((loss, correct, tokens, loss / tokens.clamp(min=1), torch.ones_like(loss))).double()
        self.sums[depth] = self.sums[depth] + row if depth in self.sums else row

    def clear(self) -> None:
        """Forgets everything."""
        self.sums.clear()
