"""Steps with a loss or gradient that is NaN or infinite: found before the optimizer, named by exit, rank and step, and skipped."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sorted.errors import TrainingError
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.training.watch.trained_step import TrainedStep


@dataclass
class NonfiniteSteps:
    """Counts steps that were not finite and ends the run when too many follow each other.

    Attributes:
        allowed: Steps in a row that may be skipped.
        say: Takes a line for the user.
        in_a_row: Skipped just now, one after another.
    """

    allowed: int
    say: Callable[[str], None]
    in_a_row: int = 0

    def after(self, step: TrainedStep) -> None:
        """Record a step; say so where it was skipped.

        Raises:
            TrainingError: It is one too many.
        """
        where = step.result.not_finite
        if where is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row > self.allowed:
            raise TrainingError(
                f"step {step.number}: {where}. That is {self.in_a_row} steps in a row, and --nonfinite-steps-allowed is {self.allowed}. No "
                "checkpoint was saved since. Lower --lr, look at the data of these steps, or start again with --load from an earlier one."
            )
        self.say(
            f"step {step.number} skipped: {where} ({self.in_a_row} in a row, {self.allowed} allowed)"
        )


def someone_found(flag: torch.Tensor) -> bool:
    """Return whether ``flag`` is above 0 on any rank.

    Collective: one all-reduce of a number over all ranks. The host waits for the device.
    """
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item() > 0)


def where_from(ledger: Ledger, grad_norm: float) -> str:
    """Return which exits on which ranks had a loss or gradient that is not finite, the same on all ranks.

    Collective: one all-gather of words over all ranks.

    Args:
        ledger: Of the step, with the exits of this rank.
        grad_norm: Of the whole model.
    """
    everybody: list[dict[int, list[str]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everybody, ledger.bad_exits())
    found: dict[tuple[int, str], list[int]] = {}
    for rank, exits in enumerate(everybody):
        for depth, words in exits.items():
            found.setdefault((depth, " and ".join(words)), []).append(rank)
    if not found:
        kind = "NaN" if math.isnan(grad_norm) else "infinite"
        return f"the gradient norm is {kind}, although loss and gradient of every exit are finite (a layer's backward overflowed)"
    return "; ".join(
        f"{words} of exit {depth} not finite on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        for (depth, words), ranks in sorted(found.items())
    )


def check_finite_weights(chunks: list[torch.nn.Module]) -> None:
    """Check that every weight is finite on every rank, before a checkpoint is saved over good ones.

    Collective: one all-reduce of a number over all ranks. The host waits for the device.

    Raises:
        TrainingError: One is not, with the names on this rank.
    """
    parameters = {name: p for chunk in chunks for name, p in chunk.named_parameters()}
    sums = torch.stack([p.detach().float().sum() for p in parameters.values()])
    if not someone_found((~torch.isfinite(sums)).any().float()):
        return
    names = [
        name
        for name, total in zip(parameters, sums.tolist(), strict=True)
        if not math.isfinite(total)
    ]
    raise TrainingError(
        f"weights are not finite ({', '.join(names[:3]) or 'on another rank'}), so no checkpoint is saved. "
        "Start again with --load from an earlier one."
    )
