"""Rules that combine an exit's own gradient with that of all deeper exits at its hidden state.

The result is the gradient of the layers below. The exit's norm and head keep the exit's own
gradient. A factor common to both gradients, such as fp16's loss scale, passes through every rule.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist


def token_products(left_tbh: torch.Tensor, right_tbh: torch.Tensor) -> torch.Tensor:
    """Return the inner product of each token's two vectors, fp32; shape [t, b, 1]."""
    return (left_tbh.float() * right_tbh.float()).sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class GradientRule:
    """A rule that combines an exit's own gradient with that of the deeper exits.

    Attributes:
        name: Key of ``GRADIENT_RULES``.
        whole: Whether norms and products are those of all tokens of the micro-batch instead of each
            token's.
        balance: Norm of the scaled own gradient over that of the deeper one, see ``balance()``.
        group: The ranks that hold the other tokens of the micro-batch (sequence or context
            parallel); None if this rank holds all.
    """

    name: str = "sum"
    whole: bool = False
    balance: float = 1.0
    group: dist.ProcessGroup | None = None

    def join(self, own_tbh: torch.Tensor, deeper_tbh: torch.Tensor, num_above: int) -> torch.Tensor:
        """Return the gradient for the layers below, written over ``own_tbh``.

        Collective: with ``whole`` and a ``group``, for balance and project one all-reduce of two
            numbers over the group; otherwise none.

        Args:
            own_tbh: Gradient of this exit's loss.
            deeper_tbh: Gradient that comes from the layers above.
            num_above: Number of deeper exits that train at this step.
        """
        return GRADIENT_RULES[self.name](self, own_tbh, deeper_tbh, num_above)

    def products(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the inner product of each pair of gradients.

        That is one number a token [t, b, 1] in fp32, or with ``whole`` a float64 scalar for the
        micro-batch.

        Collective: with ``whole`` and a ``group`` one all-reduce of a number per pair over the
            group; otherwise none.
        """
        by_token = [token_products(*pair) for pair in pairs]
        if not self.whole:
            return tuple(by_token)
        sums = torch.stack([product.sum(dtype=torch.float64) for product in by_token])
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        return tuple(sums)


def add(
    rule: GradientRule, own: torch.Tensor, deeper: torch.Tensor, num_above: int
) -> torch.Tensor:
    """Return own + deeper: the gradient of the sum of all losses."""
    return own.add_(deeper)


def equilibrium(
    rule: GradientRule, own: torch.Tensor, deeper: torch.Tensor, num_above: int
) -> torch.Tensor:
    """Return the mean over this exit and those above.

    That is own / (N - i) + deeper (N - i - 1) / (N - i) for the i-th of N exits, counted from 0.

    Source: gradient equilibrium of IMTA (Li et al., arXiv 1908.06294, section 3.1).
    """
    return own.mul_(1 / (num_above + 1)).add_(deeper, alpha=num_above / (num_above + 1))


def balance(
    rule: GradientRule, own: torch.Tensor, deeper: torch.Tensor, num_above: int
) -> torch.Tensor:
    """Return own scaled to ``rule.balance`` times the norm of deeper, plus deeper.

    Where the norm of either is 0, own is not scaled.
    """
    own_square, deeper_square = rule.products((own, own), (deeper, deeper))
    factor = rule.balance * (deeper_square / own_square).sqrt()
    return own.mul_(torch.where((own_square > 0) & (deeper_square > 0), factor, 1.0)).add_(deeper)


def project(
    rule: GradientRule, own: torch.Tensor, deeper: torch.Tensor, num_above: int
) -> torch.Tensor:
    """Return own without its component against deeper, plus deeper.

    The component is min(<own, deeper>, 0) deeper / |deeper|^2; without it a shallow exit never
    pushes against the deeper ones.

    Source: PCGrad (Yu et al., arXiv 2001.06782, algorithm 1), in one direction: the deeper exits'
        gradient is left whole.
    """
    product, square = rule.products((own, deeper), (deeper, deeper))
    along = torch.where(square > 0, product.clamp(max=0) / square, 0.0)
    return own.add_(deeper * (1 - along))


GRADIENT_RULES: dict[
    str, Callable[[GradientRule, torch.Tensor, torch.Tensor, int], torch.Tensor]
] = {"sum": add, "equilibrium": equilibrium, "balance": balance, "project": project}
