"""Cross entropy of a chunk of tokens' logits, and its gradient, on a shard of the vocabulary."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the vocabulary.

    Attributes:
        first: Id of the first token of the shard.
        size: Number of rows of the shard that are real tokens. Rows that only pad the vocabulary
            are left out of the softmax, so the model equals its export without padding.
        group: The tensor parallel group.
        sequence_parallel: Hidden states are sharded along the sequence over the same group.
    """

    first: int
    size: int
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    @property
    def is_split(self) -> bool:
        """Return whether there is more than one shard."""
        return self.group is not None and self.group.size() > 1


@dataclass(frozen=True)
class Targets:
    """The tokens that count.

    Attributes:
        index_n: Their places among all tokens in (sequence, batch) order, or None for all tokens.
        labels_n: Their labels.
        loss_mask_n: Their weight in the loss.
    """

    index_n: torch.Tensor | None
    labels_n: torch.Tensor
    loss_mask_n: torch.Tensor


@dataclass(frozen=True)
class LossRequest:
    """Which loss an exit is to compute, and what else of every counted token.

    Attributes:
        targets: The tokens that count.
        shard: This rank's part of the vocabulary.
        chunk_tokens: Most tokens whose logits exist at one time.
        with_choice: Also the most likely token.
        with_confidence: Also its probability.
    """

    targets: Targets
    shard: VocabularyShard
    chunk_tokens: int
    with_choice: bool = False
    with_confidence: bool = False


class TokenLoss(Protocol):
    """Computes losses of a chunk's logits; a ``TokenChunk`` or alike carries them to the gradient.

    Attributes:
        request: What it is to compute.
        has_teacher: Whether it also computes a divergence from a teacher.
    """

    request: LossRequest
    has_teacher: bool

    def begin(self) -> None:
        """Make ready for the first chunk."""

    def prepare(self, span: slice, buffer_np: torch.Tensor) -> None:
        """Do what comes before the logits of ``span`` exist; may use the buffer they go to."""

    def losses(self, span: slice, logits_np: torch.Tensor, work_np: torch.Tensor) -> Any:
        """Return the chunk; ``work_np`` (fp32, may be ``logits_np`` itself) is overwritten."""

    def gradient(self, chunk: Any, scale_n: torch.Tensor, out_np: torch.Tensor) -> torch.Tensor:
        """Return the gradient of ``sum(scale * loss)``, written to ``out_np``, the logits' memory."""


@dataclass(frozen=True)
class TokenChunk:
    """What a chunk's logits became: losses, correctness, and what the gradient to the logits is made of.

    Attributes:
        loss_n, correct_n: See ``ExitLoss``.
        exponential_np: exp(logit - the token's highest logit), fp32.
        total_n: Its sum over the whole vocabulary; exponential / total is the probability.
        column_n: Column of each label; 0 where the label is another rank's.
        here_n: Whether the label is this rank's.
        choice_n: See ``ExitLoss``.
    """

    loss_n: torch.Tensor
    correct_n: torch.Tensor
    exponential_np: torch.Tensor
    total_n: torch.Tensor
    column_n: torch.Tensor
    here_n: torch.Tensor
    choice_n: torch.Tensor | None

    @property
    def confidence_n(self) -> torch.Tensor:
        """Return the most likely token's probability: exp(0) / sum of exp(logit - highest)."""
        return self.total_n.reciprocal()


def most_likely(
    logits_np: torch.Tensor, highest_n: torch.Tensor, shard: VocabularyShard
) -> torch.Tensor:
    """Return the id of the most likely token, int32; ``highest_n`` is its logit.

    Collective: where the vocabulary is split one all-reduce over ``shard.group``, of n int32.
    """
    nobody = torch.iinfo(torch.int32).max
    if not logits_np.size(1):
        choice = torch.full_like(highest_n, nobody, dtype=torch.int32)
    else:
        column = logits_np.argmax(dim=1)
        here = (
            pick(logits_np, column).float() == highest_n
            if shard.is_split
            else torch.ones_like(column, dtype=torch.bool)
        )
        choice = torch.where(here, column + shard.first, nobody).int()
    if shard.is_split:
        dist.all_reduce(choice, op=dist.ReduceOp.MIN, group=shard.group)
    return choice


def column_of(labels_n: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column of each label in this rank's shard (0 where it is another rank's), and whether it is this rank's."""
    column = labels_n - shard.first
    here = (column >= 0) & (column < shard.size)
    return torch.where(here, column, 0), here


def pick(values_np: torch.Tensor, column_n: torch.Tensor) -> torch.Tensor:
    """Return one value of each row; shapes [n, p], [n], result [n]."""
    return values_np.gather(1, column_n[:, None]).squeeze(1)


def gather_counted(
    normed_tbh: torch.Tensor, targets: Targets, shard: VocabularyShard
) -> tuple[torch.Tensor, torch.Size]:
    """Return the hidden states of the counted tokens [n, h], and the shape of those of all tokens [s, b, h].

    Collective: with sequence parallelism one all-gather of [s, b, h] over ``shard.group``.
    """
    full_sbh = normed_tbh.detach()
    if shard.sequence_parallel and shard.is_split:
        full_sbh = _gather_along_first_dim(full_sbh, group=shard.group)
    inputs_nh = full_sbh.reshape(-1, full_sbh.size(-1))
    if targets.index_n is not None:
        inputs_nh = inputs_nh.index_select(0, targets.index_n)
    return inputs_nh, full_sbh.shape


class CrossEntropy:
    """The loss of the label alone; a ``TokenLoss``.

    Source: vocabulary-parallel cross entropy of Megatron-LM (Shoeybi et al., arXiv 1909.08053,
        section 3): only a maximum and two sums a
    token cross the network, never logits.
    """

    has_teacher = False

    def __init__(self, request: LossRequest):
        self.request = request

    def begin(self) -> None:
        """Do nothing."""

    def prepare(self, span: slice, buffer_np: torch.Tensor) -> None:
        """Do nothing."""

    def losses(self, span: slice, logits_np: torch.Tensor, work_np: torch.Tensor) -> TokenChunk:
        """Return the chunk; ``work_np`` (fp32, may be ``logits_np`` itself) is overwritten.

        Collective: two all-reduces over ``shard.group``, of n and 2n floats; with the choice a
            third of n int32.
        """
        shard, labels_n = self.request.shard, self.request.targets.labels_n[span]
        has_rows = logits_np.size(1) > 0  # a shard may be made of padding only
        highest = (
            logits_np.amax(dim=1).float()
            if has_rows
            else work_np.new_full((labels_n.numel(),), float("-inf"))
        )
        if shard.is_split:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.group)
        choice = (
            most_likely(logits_np, highest, shard) if self.request.with_choice else None
        )  # before the logits are overwritten
        torch.sub(logits_np, highest[:, None], out=work_np)
        column, here = column_of(labels_n, shard)
        target = (
            torch.where(here, pick(work_np, column), 0.0) if has_rows else torch.zeros_like(highest)
        )
        total = work_np.exp_().sum(dim=1)
        if shard.is_split:
            both = torch.stack((target, total))
            dist.all_reduce(both, group=shard.group)
            target, total = both[0], both[1]
        return TokenChunk(total.log() - target, target >= 0, work_np, total, column, here, choice)

    def gradient(
        self, chunk: TokenChunk, scale_n: torch.Tensor, out_np: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of ``sum(scale * loss)`` to the logits, written to ``out_np`` (may be ``chunk.exponential_np`` itself).

        It is scale * (probability - 1 at the label). Normalising, scaling and rounding to the dtype
        of ``out_np`` are one pass over the chunk; the label's element is computed apart, before
        rounding.
        """
        factor_n = scale_n / chunk.total_n
        if not out_np.size(1):
            return out_np
        at_label_n = pick(chunk.exponential_np, chunk.column_n) * factor_n - scale_n * chunk.here_n
        torch.mul(chunk.exponential_np, factor_n[:, None], out=out_np)
        return out_np.scatter_(1, chunk.column_n[:, None], at_label_n[:, None].to(out_np.dtype))
