"""Distillation: the loss of an exit that learns from a teacher, together with its cross entropy.

The teacher is the last exit (self-distillation) or a frozen model. It is given by its normed hidden
state; its logits are computed again for each chunk of tokens and freed with it. So a taught exit
needs four products with an output matrix a step instead of three, and no tensor larger than the
logits of a chunk.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim

from megatron_sorted.loss.cross_entropy import (
    LossRequest,
    column_of,
    gather_counted,
    most_likely,
    pick,
)

ROW_BYTES = 1 << 19
"""Bytes of fp32 logits that a CPU processes together, so that its cache holds them between passes.
"""


@dataclass(frozen=True)
class Distillation:
    """How an exit learns from its teacher.

    Attributes:
        weight: Share of distillation in the exit's loss; the rest is cross entropy.
        temperature: Divisor of the logits of both.
        top_k: Number of the teacher's most likely tokens to keep, their probabilities scaled to
            sum 1; ties with the k-th are kept. None for the whole distribution.
    """

    weight: float
    temperature: float = 1.0
    top_k: int | None = None


@dataclass(frozen=True)
class _TaughtChunk:
    """Losses of one chunk of tokens, and what their gradient to the logits needs.

    Exponentials are those of a logit less the token's highest one; totals are their sums over the
    whole vocabulary.

    Attributes:
        loss_n, correct_n, choice_n, kl_n: See ``ExitLoss``.
        own_np, own_total_n: Exponentials of the exit's logits, fp32, and their total.
        warm_np, warm_total_n: The same of the logits divided by the temperature; with temperature 1
            the very same tensors.
        taught_np, taught_total_n: The same of the teacher's logits divided by the temperature;
            0 for tokens that ``top_k`` leaves out.
        column_n, here_n: See ``column_of``.
    """

    loss_n: torch.Tensor
    correct_n: torch.Tensor
    choice_n: torch.Tensor | None
    kl_n: torch.Tensor
    own_np: torch.Tensor
    own_total_n: torch.Tensor
    warm_np: torch.Tensor
    warm_total_n: torch.Tensor
    taught_np: torch.Tensor
    taught_total_n: torch.Tensor
    column_n: torch.Tensor
    here_n: torch.Tensor

    @property
    def confidence_n(self) -> torch.Tensor:
        """Return the most likely token's probability: exp(0) / sum_j exp(logit_j - highest)."""
        return self.own_total_n.reciprocal()


@dataclass(frozen=True)
class _OpenChunk:
    """A chunk of tokens while its logits are turned into exponentials and sums.

    Attributes:
        logits_np, own_np: The exit's logits, and the memory for their exponentials, fp32.
        warm_np, taught_np: The teacher's logits divided by the temperature, and the memory for
            their exponentials; afterwards ``warm_np`` holds the exit's exponentials at the
            temperature.
        highest_2n: The highest logit of the exit and of the teacher.
        lowest_n: The lowest logit that the teacher keeps; None where it keeps all.
        column_n, here_n: See ``column_of``.
        sums_5n: This shard's share of five sums, with s the exit's logits, u the teacher's, both
            less the highest, T the temperature: s at the label, sum e^s, sum e^(s / T), sum e^u
            and sum e^u (u - s / T).
    """

    logits_np: torch.Tensor
    own_np: torch.Tensor
    warm_np: torch.Tensor
    taught_np: torch.Tensor
    highest_2n: torch.Tensor
    lowest_n: torch.Tensor | None
    column_n: torch.Tensor
    here_n: torch.Tensor
    sums_5n: torch.Tensor

    def add_up(self, block: slice, temperature: float) -> None:
        """Turn the logits of some rows into exponentials and sum them over this shard."""
        sums, own = self.sums_5n[:, block], self.own_np[block]
        warm, taught = self.warm_np[block], self.taught_np[block]
        is_cut = None if self.lowest_n is None else warm < self.lowest_n[block, None]
        warm.sub_(self.highest_2n[1, block, None])
        torch.exp(warm, out=taught)
        if is_cut is not None:
            # after exp, which is many times slower for inputs that underflow
            taught.masked_fill_(is_cut, 0.0)
        sums[3] = taught.sum(dim=1)
        torch.sub(self.logits_np[block], self.highest_2n[0, block, None], out=own)
        sums[0] = torch.where(self.here_n[block], pick(own, self.column_n[block]), 0.0)
        sums[4] = torch.linalg.vecdot(taught, warm.sub_(own, alpha=1 / temperature))
        if temperature != 1.0:
            sums[2] = torch.mul(own, 1 / temperature, out=warm).exp_().sum(dim=1)
        sums[1] = own.exp_().sum(dim=1)


class TaughtCrossEntropy:
    """The loss (1 - w) CE + w T^2 KL(teacher_T || exit_T) of each token; a ``TokenLoss``.

    Subscript T marks distributions whose logits are divided by the temperature T. The factor T^2
    keeps the size of the gradient about the same at every temperature.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531, section 2.

    Args:
        request: What to compute.
        rule: How the exit learns from its teacher.
        teacher_tbh: The teacher's hidden state, normed.
        teacher_ph: The teacher's output matrix.
    """

    measures = ("kl_n",)

    def __init__(
        self,
        request: LossRequest,
        rule: Distillation,
        teacher_tbh: torch.Tensor,
        teacher_ph: torch.Tensor,
    ):
        self.request, self.rule, self.teacher_tbh = request, rule, teacher_tbh
        self.weight_ph = teacher_ph.detach()[: request.shard.size]

    def begin(self) -> None:
        """Gather the teacher's hidden states of the counted tokens, and allocate one chunk.

        Collective: with sequence parallelism one all-gather of [s, b, h] over the shard's group.
        """
        request = self.request
        self.inputs_nh, _ = gather_counted(self.teacher_tbh, request.targets, request.shard)
        shape = (min(request.chunk_tokens, request.targets.labels_n.numel()), request.shard.size)
        # the teacher's logits, later the exit's exponentials at the temperature
        self.warm = torch.empty(shape, dtype=torch.float32, device=self.teacher_tbh.device)
        # the teacher's exponentials
        self.taught = torch.empty_like(self.warm)

    def prepare(self, span: slice, buffer_np: torch.Tensor) -> None:
        """Compute the teacher's logits, divided by the temperature."""
        x, warm = self.inputs_nh[span], self.warm[: buffer_np.size(0)]
        out = warm if buffer_np.dtype == torch.float32 else buffer_np
        torch.addmm(out, x, self.weight_ph.t(), beta=0, alpha=1 / self.rule.temperature, out=out)
        if out is not warm:
            warm.copy_(out)

    def losses(self, span: slice, logits_np: torch.Tensor, work_np: torch.Tensor) -> _TaughtChunk:
        """Return the chunk; ``work_np`` (fp32, may be ``logits_np`` itself) is overwritten.

        Collective: where the vocabulary is split two all-reduces over ``shard.group``, of 2n and 5n
            floats (with the choice a third, of n int32); with ``top_k`` one all-gather of n x k
            floats.
        """
        shard, rule, rows = self.request.shard, self.rule, logits_np.size(0)
        warm, taught = self.warm[:rows], self.taught[:rows]
        if shard.size:
            highest = torch.stack((logits_np.amax(dim=1).float(), warm.amax(dim=1)))
        else:  # a shard may hold padding only
            highest = warm.new_full((2, rows), float("-inf"))
        if shard.is_split:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.group)
        # before the logits are overwritten
        choice = most_likely(logits_np, highest[0], shard) if self.request.with_choice else None
        lowest_n = None if rule.top_k is None else self._lowest_kept(warm)
        column, here = column_of(self.request.targets.labels_n[span], shard)
        sums = warm.new_zeros(5, rows)
        if shard.size:
            open_chunk = _OpenChunk(
                logits_np, work_np, warm, taught, highest, lowest_n, column, here, sums
            )
            for block in self._blocks(rows):
                open_chunk.add_up(block, rule.temperature)
        if shard.is_split:
            dist.all_reduce(sums, group=shard.group)
        target, own_total, warm_total, taught_total, weighted_difference = sums
        if rule.temperature == 1.0:
            warm, warm_total = work_np, own_total
        # KL = sum q (log q - log p) with log q = u - log sum e^u and log p = s - log sum e^s;
        # the weighted difference is sum e^u (u - s)
        kl = weighted_difference / taught_total - taught_total.log() + warm_total.log()
        return _TaughtChunk(
            loss_n=own_total.log() - target,
            correct_n=target >= 0,
            choice_n=choice,
            kl_n=kl,
            own_np=work_np,
            own_total_n=own_total,
            warm_np=warm,
            warm_total_n=warm_total,
            taught_np=taught,
            taught_total_n=taught_total,
            column_n=column,
            here_n=here,
        )

    def _blocks(self, rows: int) -> list[slice]:
        """Return the blocks of rows that are processed together: all at once except on a CPU."""
        step = (
            max(1, ROW_BYTES // (4 * self.request.shard.size))
            if self.warm.device.type == "cpu"
            else rows
        )
        return [slice(start, start + step) for start in range(0, rows, max(1, step))]

    def _lowest_kept(self, logits_np: torch.Tensor) -> torch.Tensor:
        """Return for each token the ``top_k``-th highest logit of the teacher, over all shards.

        Collective: where the vocabulary is split one all-gather over ``shard.group``, of n x k
            floats.
        """
        shard, top_k = self.request.shard, self.rule.top_k
        highest_nk = logits_np.topk(min(top_k, shard.size), dim=1).values
        if shard.is_split:
            missing = highest_nk.new_full(
                (highest_nk.size(0), top_k - highest_nk.size(1)), float("-inf")
            )
            gathered = _gather_along_first_dim(
                torch.cat((highest_nk, missing), dim=1), group=shard.group
            )
            highest_nk = (
                torch.cat(gathered.split(logits_np.size(0)), dim=1).topk(top_k, dim=1).values
            )
        return highest_nk[:, top_k - 1]

    def gradient(
        self, chunk: _TaughtChunk, scale_n: torch.Tensor, out_np: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of ``sum(scale * loss)`` to the logits, written to ``out_np``.

        It is scale * ((1 - w) (p - [token is the label]) + w T (p_T - q_T)), with p the exit's and
        q the teacher's probabilities.
        """
        weight, temperature = self.rule.weight, self.rule.temperature
        if not out_np.size(1):
            return out_np
        label_n, taught_n = (1 - weight) * scale_n, weight * temperature * scale_n
        own_n = label_n if temperature != 1.0 else scale_n
        for block in self._blocks(out_np.size(0)):
            d = chunk.own_np[block].mul_((own_n / chunk.own_total_n)[block, None])
            if temperature != 1.0:
                d.addcmul_(chunk.warm_np[block], (taught_n / chunk.warm_total_n)[block, None])
            d.addcmul_(
                chunk.taught_np[block], (taught_n / chunk.taught_total_n)[block, None], value=-1
            )
            d.scatter_add_(1, chunk.column_n[block, None], -(label_n * chunk.here_n)[block, None])
            if d.data_ptr() != out_np[block].data_ptr():
                out_np[block].copy_(d)
        return out_np
