"""Self-distillation: the loss of an exit that learns from the last one, chunk by chunk together with its cross entropy.

The teacher is known by its normed hidden state; its logits are computed again for each chunk and forgotten with it. So a step needs
four products with an output matrix for a taught exit instead of three, and no tensor larger than a chunk of logits.
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
"""Rows of so many bytes of fp32 logits are passed over together on a CPU, whose cache then still holds them at the next pass."""


@dataclass(frozen=True)
class Distillation:
    """How an exit learns from its teacher.

    Attributes:
        weight: Share of distillation in its loss; the rest is cross entropy.
        temperature: By which the logits of both are divided.
        top_k: Keep the teacher's ``top_k`` most likely tokens, scaled to sum 1; ties with the k-th are
            kept. None for the whole distribution.
    """

    weight: float
    temperature: float = 1.0
    top_k: int | None = None


@dataclass(frozen=True)
class _TaughtChunk:
    """What a chunk's logits became; the exponentials are of logits less the token's highest one.

    Attributes:
        loss_n, correct_n, choice_n, kl_n: See ``ExitLoss``.
        own_np, own_total_n: Exponentials of the exit's logits, fp32, and their sum over the whole vocabulary.
        warm_np, warm_total_n: The same at the temperature; with temperature 1 the very same tensors.
        taught_np, taught_total_n: Those of the teacher's at the temperature, 0 where it is cut.
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
        """Return the probability of each most likely token."""
        return self.own_total_n.reciprocal()


@dataclass(frozen=True)
class _OpenChunk:
    """A chunk of tokens while its logits become exponentials and sums.

    Attributes:
        logits_np, own_np: The exit's logits, and where their exponentials go, fp32.
        warm_np, taught_np: The teacher's logits at the temperature, and where their exponentials go;
            afterwards ``warm_np`` holds the exit's exponentials at the temperature.
        highest_2n: The highest logit of the exit and of the teacher.
        lowest_n: The lowest logit that the teacher keeps; None where it keeps all.
        column_n, here_n: See ``column_of``.
        sums_5n: This shard's part of: logit of the label, and sums of the exit's exponentials, of
            those at the temperature, of the teacher's, and of the teacher's times the difference.
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
        """Turn logits into exponentials and add up this shard's part of all sums, for some rows."""
        sums, own, warm, taught = (
            self.sums_5n[:, block],
            self.own_np[block],
            self.warm_np[block],
            self.taught_np[block],
        )
        is_cut = None if self.lowest_n is None else warm < self.lowest_n[block, None]
        warm.sub_(self.highest_2n[1, block, None])
        torch.exp(warm, out=taught)
        if is_cut is not None:
            taught.masked_fill_(
                is_cut, 0.0
            )  # after exp, which takes many times as long for numbers of which it is 0
        sums[3] = taught.sum(dim=1)
        torch.sub(self.logits_np[block], self.highest_2n[0, block, None], out=own)
        sums[0] = torch.where(self.here_n[block], pick(own, self.column_n[block]), 0.0)
        sums[4] = torch.linalg.vecdot(taught, warm.sub_(own, alpha=1 / temperature))
        if temperature != 1.0:
            sums[2] = torch.mul(own, 1 / temperature, out=warm).exp_().sum(dim=1)
        sums[1] = own.exp_().sum(dim=1)


class TaughtCrossEntropy:
    """The loss (1 - w) CE + w T^2 KL(teacher_T || exit_T) of every token; a ``TokenLoss``.

    T^2 keeps the size of the gradient whatever the temperature (Hinton, Vinyals and Dean, arXiv 1503.02531, section 2).

    Args:
        request: What to compute.
        rule: How it learns.
        teacher_tbh: The teacher's hidden state, normed.
        teacher_ph: The teacher's output matrix.
    """

    has_teacher = True

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
        """Gather the teacher's hidden state of the counted tokens, and make room for a chunk.

        Collective: with sequence parallelism one all-gather of [s, b, h] over the shard's group.
        """
        request = self.request
        self.inputs_nh, _ = gather_counted(self.teacher_tbh, request.targets, request.shard)
        shape = (min(request.chunk_tokens, request.targets.labels_n.numel()), request.shard.size)
        # first the teacher's logits, then the exit's exponentials at the temperature; and the teacher's exponentials
        self.warm = torch.empty(shape, dtype=torch.float32, device=self.teacher_tbh.device)
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

        Collective: two all-reduces over ``shard.group``, of 2n and 5n floats (with the choice a third, of n int32); for a teacher that
        is cut one all-gather of n x k floats.
        """
        shard, rule, rows = self.request.shard, self.rule, logits_np.size(0)
        warm, taught = self.warm[:rows], self.taught[:rows]
        if shard.size:
            highest = torch.stack((logits_np.amax(dim=1).float(), warm.amax(dim=1)))
        else:  # a shard may be made of padding only
            highest = warm.new_full((2, rows), float("-inf"))
        if shard.is_split:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.group)
        choice = (
            most_likely(logits_np, highest[0], shard) if self.request.with_choice else None
        )  # before the logits are overwritten
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
        target, own_total, warm_total, taught_total, apart = sums
        if rule.temperature == 1.0:
            warm, warm_total = work_np, own_total
        # sum q (log q - log p) with log q = u - log sum e^u and log p = s - log sum e^s; apart is sum e^u (u - s)
        kl = apart / taught_total - taught_total.log() + warm_total.log()
        return _TaughtChunk(
            own_total.log() - target,
            target >= 0,
            choice,
            kl,
            work_np,
            own_total,
            warm,
            warm_total,
            taught,
            taught_total,
            column,
            here,
        )

    def _blocks(self, rows: int) -> list[slice]:
        """Return the rows that are passed over together."""
        step = (
            max(1, ROW_BYTES // (4 * self.request.shard.size))
            if self.warm.device.type == "cpu"
            else rows
        )
        return [slice(start, start + step) for start in range(0, rows, max(1, step))]

    def _lowest_kept(self, logits_np: torch.Tensor) -> torch.Tensor:
        """Return the lowest of the teacher's ``top_k`` highest logits over the whole vocabulary, for each token.

        Collective: where the vocabulary is split one all-gather over ``shard.group``, of n x k floats.
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

        It is scale * ((1 - w) (p - 1 at the label) + w T (p_T - q_T)), p the exit's and q the teacher's probabilities.
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
