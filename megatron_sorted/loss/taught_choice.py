"""Learning a teacher's choice: cross entropy of an exit on the token its teacher finds most likely.

Greedy decoding accepts a drafted token exactly where the exit's most likely token is the full
model's, so this trains what a draft is used for. The teacher is given as in ``loss.distillation``.
Of its logits only the choice is kept: they are written to the memory of the exit's logits, which
overwrite them, so no memory is needed beyond that of plain cross entropy.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sorted.loss.cross_entropy import (
    CrossEntropy,
    LossRequest,
    TokenChunk,
    column_of,
    gather_counted,
    most_likely,
    pick,
)


@dataclass(frozen=True)
class _ChoiceChunk(TokenChunk):
    """A chunk of tokens with the losses on the teacher's choices.

    Attributes:
        kl_n, agree_n: See ``ExitLoss``.
        taught_column_n, taught_here_n: The teacher's choice as ``column_of`` gives it.
    """

    kl_n: torch.Tensor
    agree_n: torch.Tensor
    taught_column_n: torch.Tensor
    taught_here_n: torch.Tensor


class ChoiceCrossEntropy(CrossEntropy):
    """The loss (1 - w) CE(label) + w CE(teacher's choice) of each token; a ``TokenLoss``.

    The choice is the teacher's most likely token, of equally likely ones the lowest id. It is
    computed from logits in the dtype of the exit's.

    Args:
        request: What to compute.
        weight: The share w.
        teacher_tbh: The teacher's hidden state, normed.
        teacher_ph: The teacher's output matrix.
    """

    measures = ("kl_n", "agree_n")

    def __init__(
        self,
        request: LossRequest,
        weight: float,
        teacher_tbh: torch.Tensor,
        teacher_ph: torch.Tensor,
    ):
        super().__init__(request)
        self.weight, self.teacher_tbh = weight, teacher_tbh
        self.weight_ph = teacher_ph.detach()[: request.shard.size]

    def begin(self) -> None:
        """Gather the teacher's hidden states of the counted tokens.

        Collective: with sequence parallelism one all-gather of [s, b, h] over the shard's group.
        """
        request = self.request
        self.inputs_nh, _ = gather_counted(self.teacher_tbh, request.targets, request.shard)

    def prepare(self, span: slice, buffer_np: torch.Tensor) -> None:
        """Find the teacher's choices, with its logits in the memory of the exit's.

        Collective: where the vocabulary is split two all-reduces over ``shard.group``, of n floats
            and n int32.
        """
        shard, x = self.request.shard, self.inputs_nh[span]
        logits = torch.mm(x, self.weight_ph.t(), out=buffer_np)
        if shard.size:
            highest = logits.amax(dim=1).float()
        else:  # a shard may hold padding only
            highest = torch.full((x.size(0),), float("-inf"), device=x.device)
        if shard.is_split:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.group)
        self.choice_n = most_likely(logits, highest, shard).long()

    def losses(self, span: slice, logits_np: torch.Tensor, work_np: torch.Tensor) -> _ChoiceChunk:
        """Return the chunk; ``work_np`` (fp32, may be ``logits_np`` itself) is overwritten.

        Collective: that of ``CrossEntropy``, and where the vocabulary is split one more all-reduce
            over ``shard.group``, of n floats.
        """
        shard = self.request.shard
        column, here = column_of(self.choice_n, shard)
        # before the logits are overwritten
        taught = (
            torch.where(here, pick(logits_np, column).float(), 0.0)
            if shard.size
            else work_np.new_zeros(column.numel())
        )
        if shard.is_split:
            dist.all_reduce(taught, group=shard.group)
        chunk = super().losses(span, logits_np, work_np)
        return _ChoiceChunk(
            **vars(chunk),
            kl_n=chunk.total_n.log() - (taught - chunk.highest_n),
            agree_n=taught == chunk.highest_n,
            taught_column_n=column,
            taught_here_n=here,
        )

    def gradient(
        self, chunk: _ChoiceChunk, scale_n: torch.Tensor, out_np: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of ``sum(scale * loss)`` to the logits, written to ``out_np``.

        It is scale * (p - (1 - w) [token is the label] - w [token is the teacher's choice]), with p
        the exit's probabilities.
        """
        if not out_np.size(1):
            return out_np
        d = chunk.exponential_np.mul_((scale_n / chunk.total_n)[:, None])
        for share, column_n, here_n in (
            (1 - self.weight, chunk.column_n, chunk.here_n),
            (self.weight, chunk.taught_column_n, chunk.taught_here_n),
        ):
            d.scatter_add_(1, column_n[:, None], -(share * scale_n * here_n)[:, None])
        return d if d.data_ptr() == out_np.data_ptr() else out_np.copy_(d)
