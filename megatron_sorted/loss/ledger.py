"""What the exits of a step (or of an evaluation) said, added up without waiting for the device."""

from dataclasses import dataclass, field

import torch

from megatron_sorted.loss.gradient_rules import token_products
from megatron_sorted.loss.linear_cross_entropy import ExitLoss

COLUMNS = (
    "loss", "correct", "tokens", "mean_loss", "micro_batches", "calls", "pieces", "exact_pieces", "gradient_square", "steps",
    "kl", "mean_kl", "taught_batches", "met_product", "met_own", "met_deeper",
)  # fmt: skip
MET = ("met_product", "met_own", "met_deeper")
LOSS, GRADIENT, STEPS = (
    COLUMNS.index("loss"),
    COLUMNS.index("gradient_square"),
    COLUMNS.index("steps"),
)


def square_sum(gradient: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of a gradient in half or single precision, as a float64 scalar; above 3e38 a token it is infinite.

    Only a token's numbers are summed in single precision: over all of them at once torch loses digits on the CPU.

    Shapes: gradient [..., h].
    """
    return torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32).double().square().sum()


@dataclass
class Ledger:
    """Sums per exit over micro-batches on this rank.

    Attributes:
        sums: Per depth a float64 tensor with the sums named in ``COLUMNS``: loss x mask, labels that were the most likely token,
            tokens, micro-batch means of the loss, micro-batches that have trained tokens, all micro-batches, pieces (documents),
            pieces with every label right, squared norm of the gradient that the exit's own loss sends down (of finished steps),
            and finished steps in which the exit trained; then KL to the teacher x mask, micro-batch means of it, and micro-batches
            with a teacher and trained tokens; then, of finished steps that measured it, the product of the exit's own gradient
            with that of the deeper exits, and the squared norms of both.
        drafts: Per depth what ``agreement.draft_counts`` counted [2, k], float64.
        open_squares: Per depth the squared norm of the unfinished step's gradient, still multiplied by what the step divides by.
        open_meetings: Per depth what ``add_meeting`` was given in the unfinished step, multiplied likewise; [3].
    """

    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    drafts: dict[int, torch.Tensor] = field(default_factory=dict)
    open_squares: dict[int, torch.Tensor] = field(default_factory=dict)
    open_meetings: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(
        self,
        depth: int,
        losses: ExitLoss,
        loss_mask_n: torch.Tensor,
        piece_n: torch.Tensor | None = None,
        num_pieces: int = 0,
        whole: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Add one micro-batch of the exit at ``depth``; one without trained tokens counts in no mean.

        Args:
            depth: The exit.
            losses: What it said.
            loss_mask_n: The tokens' weights.
            piece_n: Number of the document of each token, to count the exact ones; shape [n].
            num_pieces: A number above every one in ``piece_n``, known to the host: reading it off the device would wait for it.
            whole: Sum of the loss and tokens of the whole micro-batch, where this rank sees a part of its sequences.
        """
        loss, tokens = (losses.loss_n * loss_mask_n).sum(), loss_mask_n.sum()
        whole_loss, whole_tokens = whole or (loss, tokens)
        has_tokens, some = (whole_tokens > 0).to(loss.dtype), whole_tokens.clamp(min=1)
        sums = {
            "loss": loss,
            "correct": (losses.correct_n * loss_mask_n).sum(),
            "tokens": tokens,
            "mean_loss": whole_loss / some,
            "micro_batches": has_tokens,
            "calls": torch.ones_like(loss),
        }
        if piece_n is not None:
            members = loss_mask_n.new_zeros(num_pieces).index_add_(
                0, piece_n, torch.ones_like(loss_mask_n)
            )
            right = loss_mask_n.new_zeros(num_pieces).index_add_(
                0, piece_n, losses.correct_n.float()
            )
            sums["pieces"] = (members > 0).sum().float()
            sums["exact_pieces"] = ((members > 0) & (members == right)).sum().float()
        if losses.kl_n is not None:
            kl = (losses.kl_n * loss_mask_n).sum()
            sums |= {"kl": kl, "mean_kl": kl / some, "taught_batches": has_tokens}
        none = torch.zeros_like(loss)
        _add(self.sums, depth, torch.stack([sums.get(name, none) for name in COLUMNS]).double())

    def add_gradient(self, depth: int, gradient: torch.Tensor) -> None:
        """Add the gradient that one micro-batch of the exit at ``depth`` sends into the hidden state below it."""
        _add(self.open_squares, depth, square_sum(gradient))

    def add_meeting(self, depth: int, own_tbh: torch.Tensor, deeper_tbh: torch.Tensor) -> None:
        """Add what the exit's own gradient of one micro-batch and that of the deeper exits are to each other, before they are joined."""
        product = token_products(own_tbh, deeper_tbh).sum(dtype=torch.float64)
        _add(
            self.open_meetings,
            depth,
            torch.stack((product, square_sum(own_tbh), square_sum(deeper_tbh))),
        )

    def add_drafts(self, depth: int, counts: torch.Tensor) -> None:
        """Add what ``agreement.draft_counts`` counted for the exit at ``depth``."""
        _add(self.drafts, depth, counts.double())

    def finish_step(self, divisor: torch.Tensor) -> None:
        """End a step: its gradients are divided by ``divisor`` (a scalar on the device), which only the end of a step knows."""
        for depth, square in self.open_squares.items():
            row = self.sums[depth]
            row[GRADIENT].add_(square / divisor.double().square().reshape(()))
            row[STEPS].add_(1)
        self.open_squares.clear()
        for depth, sums in self.open_meetings.items():
            self.sums[depth][-len(MET) :].add_(sums / divisor.double().square().reshape(()))
        self.open_meetings.clear()

    def merge(self, other: "Ledger") -> None:
        """Add the sums of ``other``: those of a step that is to count, to those of the steps since the last report."""
        for ours, theirs in (
            (self.sums, other.sums),
            (self.drafts, other.drafts),
            (self.open_squares, other.open_squares),
            (self.open_meetings, other.open_meetings),
        ):
            for depth, value in theirs.items():
                _add(ours, depth, value)

    def bad_flag(self, device: torch.device) -> torch.Tensor:
        """Return a float32 scalar on the device: 1 if a loss or gradient of any exit on this rank is NaN or infinite, else 0."""
        flags = list(self._bad().values())
        return torch.stack(flags).any().float() if flags else torch.zeros((), device=device)

    def bad_exits(self) -> dict[int, list[str]]:
        """Return {depth: which of "loss" and "gradient" is NaN or infinite} of this rank's exits. Makes the host wait for the device."""
        flags = self._bad()
        if not flags:
            return {}
        found: dict[int, list[str]] = {}
        for (depth, name), bad in zip(
            flags, torch.stack(list(flags.values())).tolist(), strict=True
        ):
            if bad:
                found.setdefault(depth, []).append(name)
        return found

    def _bad(self) -> dict[tuple[int, str], torch.Tensor]:
        flags = {}
        for depth, row in sorted(self.sums.items()):
            gradient = (
                row[GRADIENT] + self.open_squares[depth]
                if depth in self.open_squares
                else row[GRADIENT]
            )
            flags[depth, "loss"], flags[depth, "gradient"] = (
                ~row[LOSS].isfinite(),
                ~gradient.isfinite(),
            )
        return flags

    def drop_gradients(self) -> None:
        """Forget the gradients of finished steps: those of a step whose loss scale was too high say nothing."""
        for row in self.sums.values():
            row[GRADIENT].zero_()
            row[STEPS].zero_()
            row[-len(MET) :].zero_()

    def clear(self) -> None:
        """Forget everything."""
        for sums in (self.sums, self.drafts, self.open_squares, self.open_meetings):
            sums.clear()


def _add(sums: dict[int, torch.Tensor], depth: int, value: torch.Tensor) -> None:
    # always a tensor of its own: a ledger that was merged goes on without changing this one
    sums[depth] = sums[depth] + value if depth in sums else value.clone()
