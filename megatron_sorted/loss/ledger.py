"""Sums of the exits' results over a step or an evaluation, without waiting for the device."""

import itertools
from dataclasses import dataclass, field

import torch

from megatron_sorted.loss.gradient_rules import token_products
from megatron_sorted.loss.linear_cross_entropy import ExitLoss

COLUMNS = (
    "loss", "correct", "tokens", "mean_loss", "micro_batches", "calls", "pieces", "exact_pieces",
    "gradient_square", "steps", "kl", "mean_kl", "taught_batches", "agreed",
    "met_product", "met_own", "met_deeper",
)  # fmt: skip
MET = ("met_product", "met_own", "met_deeper")
"""Columns on the two gradients that meet at an exit: its own, and that of the deeper exits."""

LOSS, GRADIENT, STEPS = map(COLUMNS.index, ("loss", "gradient_square", "steps"))


def square_sum(gradient: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of a gradient in half or single precision, as a float64 scalar.

    Each token's numbers are summed in single precision, so above 3e38 a token the sum is infinite;
    tokens are summed in double precision, because torch loses digits over all of them on the CPU.

    Shapes: gradient [..., h].
    """
    return torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32).double().square().sum()


@dataclass
class Ledger:
    """Sums per exit over micro-batches on this rank.

    Attributes:
        sums: {depth: float64 tensor of the sums named in ``COLUMNS``}. They are: loss x mask,
            labels that were the most likely token, tokens, micro-batch means of the loss,
            micro-batches that have trained tokens, all micro-batches, pieces (documents), pieces
            with every label right, squared norm of the gradient that the exit's own loss sends down
            (over finished steps), and finished steps in which the exit trained; then KL to the
            teacher x mask, its micro-batch means, micro-batches with a teacher and trained tokens,
            and tokens that agree with the teacher's choice; then, over finished steps that measured
            it, the product of the exit's own gradient with that of the deeper exits, and the
            squared norms of both.
        drafts: {depth: counts of ``agreement.draft_counts``}; [2, k], float64.
        open_squares: {depth: squared norm of the unfinished step's gradient}, not yet divided by
            the step's divisor.
        open_gradient_pairs: {depth: sums of ``add_gradient_pair`` in the unfinished step [3]}, not
            yet divided.
    """

    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    drafts: dict[int, torch.Tensor] = field(default_factory=dict)
    open_squares: dict[int, torch.Tensor] = field(default_factory=dict)
    open_gradient_pairs: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(
        self,
        depth: int,
        losses: ExitLoss,
        loss_mask_n: torch.Tensor,
        piece_n: torch.Tensor | None = None,
        num_pieces: int = 0,
        whole: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Add one micro-batch of the exit at ``depth``.

        A micro-batch without trained tokens counts in no mean.

        Args:
            depth: The exit.
            losses: The exit's losses.
            loss_mask_n: The tokens' weights.
            piece_n: Number of the document of each token, to count the exact ones; shape [n].
            num_pieces: A number above every one in ``piece_n``, known to the host, because reading
                it from the device would wait.
            whole: Sum of the loss and number of tokens of the whole micro-batch, where this rank
                holds only a part of its sequences.
        """
        loss, tokens = (losses.loss_n * loss_mask_n).sum(), loss_mask_n.sum()
        whole_loss, whole_tokens = whole or (loss, tokens)
        has_tokens, divisor = (whole_tokens > 0).to(loss.dtype), whole_tokens.clamp(min=1)
        sums = {
            "loss": loss,
            "correct": (losses.correct_n * loss_mask_n).sum(),
            "tokens": tokens,
            "mean_loss": whole_loss / divisor,
            "micro_batches": has_tokens,
            "calls": torch.ones_like(loss),
        }
        if piece_n is not None:
            members, correct = (
                loss_mask_n.new_zeros(num_pieces).index_add_(0, piece_n, counted)
                for counted in (torch.ones_like(loss_mask_n), losses.correct_n.float())
            )
            sums["pieces"] = (members > 0).sum().float()
            sums["exact_pieces"] = ((members > 0) & (members == correct)).sum().float()
        if losses.kl_n is not None:
            kl = (losses.kl_n * loss_mask_n).sum()
            sums |= {"kl": kl, "mean_kl": kl / divisor, "taught_batches": has_tokens}
        if losses.agree_n is not None:
            sums["agreed"] = (losses.agree_n * loss_mask_n).sum()
        zero = torch.zeros_like(loss)
        _add(self.sums, depth, torch.stack([sums.get(name, zero) for name in COLUMNS]).double())

    def add_gradient(self, depth: int, gradient: torch.Tensor) -> None:
        """Add the gradient that one micro-batch of the exit sends into the hidden state below."""
        _add(self.open_squares, depth, square_sum(gradient))

    def add_gradient_pair(
        self, depth: int, own_tbh: torch.Tensor, deeper_tbh: torch.Tensor
    ) -> None:
        """Add product and squares of one micro-batch's two gradients at an exit.

        They are the exit's own gradient and that of the deeper exits, before they are combined.
        """
        product = token_products(own_tbh, deeper_tbh).sum(dtype=torch.float64)
        _add(
            self.open_gradient_pairs,
            depth,
            torch.stack((product, square_sum(own_tbh), square_sum(deeper_tbh))),
        )

    def add_drafts(self, depth: int, counts: torch.Tensor) -> None:
        """Add counts of ``agreement.draft_counts`` for the exit at ``depth``."""
        _add(self.drafts, depth, counts.double())

    def finish_step(self, divisor: torch.Tensor) -> None:
        """End a step: divide its gradients by ``divisor``, a scalar on the device.

        Only the end of a step knows the divisor.
        """
        for depth, square in self.open_squares.items():
            row = self.sums[depth]
            row[GRADIENT].add_(square / divisor.double().square().reshape(()))
            row[STEPS].add_(1)
        self.open_squares.clear()
        for depth, sums in self.open_gradient_pairs.items():
            self.sums[depth][-len(MET) :].add_(sums / divisor.double().square().reshape(()))
        self.open_gradient_pairs.clear()

    def merge(self, other: "Ledger") -> None:
        """Add the sums of ``other``, such as those of a finished step to those since a report."""
        for ours, theirs in (
            (self.sums, other.sums),
            (self.drafts, other.drafts),
            (self.open_squares, other.open_squares),
            (self.open_gradient_pairs, other.open_gradient_pairs),
        ):
            for depth, value in theirs.items():
                _add(ours, depth, value)

    def bad_flag(self, device: torch.device) -> torch.Tensor:
        """Return 1 if a loss or gradient of an exit on this rank is NaN or infinite, else 0.

        The result is a float32 scalar on the device.
        """
        flags = list(self._bad().values())
        return torch.stack(flags).any().float() if flags else torch.zeros((), device=device)

    def bad_exits(self) -> dict[int, list[str]]:
        """Return {depth: which of "loss" and "gradient" is NaN or infinite} of this rank's exits.

        The host waits for the device.
        """
        flags = self._bad()
        if not flags:
            return {}
        bad_exits: dict[int, list[str]] = {}
        is_bad = torch.stack(list(flags.values())).tolist()
        for depth, name in itertools.compress(flags, is_bad):
            bad_exits.setdefault(depth, []).append(name)
        return bad_exits

    def _bad(self) -> dict[tuple[int, str], torch.Tensor]:
        """Return {(depth, "loss" or "gradient"): whether it is NaN or infinite}, on the device."""
        flags = {}
        for depth, row in sorted(self.sums.items()):
            gradient = row[GRADIENT] + self.open_squares.get(depth, 0.0)
            flags[depth, "loss"] = ~row[LOSS].isfinite()
            flags[depth, "gradient"] = ~gradient.isfinite()
        return flags

    def drop_gradients(self) -> None:
        """Forget the gradients of finished steps, such as of one whose loss scale was too high."""
        for row in self.sums.values():
            row[GRADIENT].zero_()
            row[STEPS].zero_()
            row[-len(MET) :].zero_()

    def clear(self) -> None:
        """Forget everything."""
        for sums in (self.sums, self.drafts, self.open_squares, self.open_gradient_pairs):
            sums.clear()


def _add(sums: dict[int, torch.Tensor], depth: int, value: torch.Tensor) -> None:
    """Add ``value`` to the sum at ``depth``.

    The sum is always a new tensor, so that a ledger that was merged can be added to again without
    changing this one.
    """
    sums[depth] = sums[depth] + value if depth in sums else value.clone()
