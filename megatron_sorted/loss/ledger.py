"""What the exits of a step (or of an evaluation) said, added up without waiting for the device."""

from dataclasses import dataclass, field

import torch

from megatron_sorted.loss.linear_cross_entropy import ExitLoss

COLUMNS = ("loss", "correct", "tokens", "mean_loss", "micro_batches", "pieces", "exact_pieces")


@dataclass
class Ledger:
    """Sums per exit over micro-batches on this rank.

    Attributes:
        sums: Per depth a float64 tensor with the sums named in ``COLUMNS``: loss x mask, labels that were the most likely token,
            tokens, micro-batch means of the loss, micro-batches, pieces (documents), and pieces with every label right.
    """

    sums: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, depth: int, losses: ExitLoss, loss_mask_n: torch.Tensor, piece_n: torch.Tensor | None = None) -> None:
        """Adds one micro-batch of the exit at ``depth``; ``piece_n`` [n] numbers the document of each token, to count exact ones."""
        loss = (losses.loss_n * loss_mask_n).sum()
        tokens = loss_mask_n.sum()
        correct = (losses.correct_n * loss_mask_n).sum()
        pieces = exact = torch.zeros_like(loss)
        if piece_n is not None and piece_n.numel():
            size = int(piece_n.max()) + 1
            members = torch.zeros(size, device=loss.device).index_add_(0, piece_n, torch.ones_like(loss_mask_n))
            right = torch.zeros(size, device=loss.device).index_add_(0, piece_n, losses.correct_n.float())
            pieces = (members > 0).sum().float()
            exact = ((members > 0) & (members == right)).sum().float()
        row = torch.stack((loss, correct, tokens, loss / tokens.clamp(min=1), torch.ones_like(loss), pieces, exact)).double()
        self.sums[depth] = self.sums[depth] + row if depth in self.sums else row

    def clear(self) -> None:
        """Forgets everything."""
        self.sums.clear()

    def merge(self, other: "Ledger") -> None:
        """Adds other's sums."""
        for depth, row in other.sums.items():
            self.sums[depth] = self.sums[depth] + row if depth in self.sums else row.clone()

    def bad_flag(self) -> torch.Tensor:
        """Returns 1 where bad."""
        if not self.sums:
            return torch.zeros(())
        return (~torch.isfinite(torch.stack([row[0] for row in self.sums.values()]))).any().float()

    def bad_exits(self) -> dict[int, list[str]]:
        """Returns names."""
        return {d: ["loss"] for d, row in self.sums.items() if not torch.isfinite(row[0])}
