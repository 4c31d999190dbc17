"""Steps with a loss or gradient that is NaN or infinite.

They are detected before the optimizer steps, reported by exit, rank and step, and skipped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sorted.errors import TrainingError
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.training.step_result import TrainedStep


@dataclass
class NonfiniteSteps:
    """A counter of steps that were not finite; it ends the run when too many follow each other.

    Attributes:
        allowed: Number of consecutive steps that may be skipped.
        log: A function that prints a line for the user.
        in_a_row: Number of steps skipped since the last finite one.
    """

    allowed: int
    log: Callable[[str], None]
    in_a_row: int = 0

    def after(self, step: TrainedStep) -> None:
        """Count a step, and log it if it was skipped.

        Raises:
            TrainingError: Too many consecutive steps were skipped.
        """
        where = step.result.not_finite
        if where is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row > self.allowed:
            raise TrainingError(
                f"step {step.number}: {where}. That is {self.in_a_row} steps in a row, and "
                f"--nonfinite-steps-allowed is {self.allowed}. No checkpoint was saved since. "
                "Lower --lr, look at the data of these steps, or start again with --load from "
                "an earlier one."
            )
        self.log(
            f"step {step.number} skipped: {where} "
            f"({self.in_a_row} in a row, {self.allowed} allowed)"
        )


def describe_nonfinite(ledger: Ledger, grad_norm: float) -> str:
    """Return which exits on which ranks have a loss or gradient that is not finite.

    The text is the same on all ranks.

    Collective: one all-gather of short texts over all ranks.

    Args:
        ledger: The step's ledger, with the exits of this rank.
        grad_norm: The gradient norm of the whole model.
    """
    bad_exits: list[dict[int, list[str]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(bad_exits, ledger.bad_exits(), group=dist.group.WORLD)
    ranks_of: dict[tuple[int, str], list[int]] = {}
    for rank, exits in enumerate(bad_exits):
        for depth, numbers in exits.items():
            ranks_of.setdefault((depth, " and ".join(numbers)), []).append(rank)
    if not ranks_of:
        kind = "NaN" if math.isnan(grad_norm) else "infinite"
        return (
            f"the gradient norm is {kind}, although loss and gradient of every exit are finite "
            "(a layer's backward overflowed)"
        )
    return "; ".join(
        f"{numbers} of exit {depth} not finite on rank{'s' * (len(ranks) > 1)} "
        + ", ".join(map(str, ranks))
        for (depth, numbers), ranks in sorted(ranks_of.items())
    )


def check_finite_weights(chunks: list[torch.nn.Module]) -> None:
    """Check that every weight is finite on every rank, before a checkpoint is saved.

    Collective: one all-reduce of a number over all ranks. The host waits for the device.

    Raises:
        TrainingError: A weight is not finite; the message names those of this rank.
    """
    parameters = {name: p for chunk in chunks for name, p in chunk.named_parameters()}
    sums = torch.stack([p.detach().float().sum() for p in parameters.values()])
    is_bad = (~torch.isfinite(sums)).any().float()
    dist.all_reduce(is_bad, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
    if not is_bad.item():
        return
    names = [
        name
        for name, total in zip(parameters, sums.tolist(), strict=True)
        if not math.isfinite(total)
    ]
    raise TrainingError(
        f"weights are not finite ({', '.join(names[:3]) or 'on another rank'}), so no checkpoint "
        "is saved. Start again with --load from an earlier one."
    )
