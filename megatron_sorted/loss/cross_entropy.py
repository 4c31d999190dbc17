"""Cross entropy of the logits of a chunk of tokens, and its gradient, on a vocabulary shard."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's shard of the vocabulary.

    Attributes:
        first: Id of the first token of the shard.
        size: Number of rows of the shard that are real tokens. Rows that only pad the vocabulary
            are left out of the softmax, so the model equals its export without padding.
        group: The tensor parallel group; None for a vocabulary in one piece.
        sequence_parallel: Whether hidden states are sharded along the sequence over this group.
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
    """The counted tokens: those whose loss is computed.

    Attributes:
        index_n: Places of the counted tokens among all tokens in (sequence, batch) order; None
            where all tokens count.
        labels_n: Label of each counted token.
        loss_mask_n: Weight of each counted token in the loss.
    """

    index_n: torch.Tensor | None
    labels_n: torch.Tensor
    loss_mask_n: torch.Tensor


@dataclass(frozen=True)
class LossRequest:
    """What an exit is to compute for every counted token.

    Attributes:
        targets: The counted tokens.
        shard: This rank's shard of the vocabulary.
        chunk_tokens: Maximum number of tokens whose logits exist at one time.
        with_choice: Whether to return the most likely token too.
        with_confidence: Whether to return the most likely token's probability too.
    """

    targets: Targets
    shard: VocabularyShard
    chunk_tokens: int
    with_choice: bool = False
    with_confidence: bool = False


class TokenLoss(Protocol):
    """A loss of each token, and its gradient, computed from the logits of one chunk of tokens.

    ``exit_loss`` calls ``begin`` once, then for each chunk ``prepare``, ``losses`` and, if the exit
    trains, ``gradient``. The chunk that ``losses`` returns holds what the gradient needs.

    Attributes:
        request: What to compute.
        measures: Names of the optional results of ``ExitLoss`` that it computes of its teacher.
    """

    request: LossRequest
    measures: tuple[str, ...]

    def begin(self) -> None:
        """Prepare the pass over all chunks."""

    def prepare(self, span: slice, buffer_np: torch.Tensor) -> None:
        """Prepare the chunk ``span``; the buffer that its logits will be written to is free."""

    def losses(self, span: slice, logits_np: torch.Tensor, work_np: torch.Tensor) -> Any:
        """Return the chunk; ``work_np`` (fp32, may be ``logits_np`` itself) is overwritten."""

    def gradient(self, chunk: Any, scale_n: torch.Tensor, out_np: torch.Tensor) -> torch.Tensor:
        """Return the gradient of ``sum(scale * loss)``, written to ``out_np``, once the logits."""


@dataclass(frozen=True)
class TokenChunk:
    """Losses of one chunk of tokens, and what their gradient to the logits needs.

    Attributes:
        loss_n, correct_n: See ``ExitLoss``.
        exponential_np: exp(logit - the token's highest logit), fp32.
        total_n: Sum of the exponentials over the whole vocabulary; exponential / total is the
            probability.
        column_n, here_n: See ``column_of``.
        choice_n: See ``ExitLoss``.
        highest_n: The highest logit over the whole vocabulary, fp32.
    """

    loss_n: torch.Tensor
    correct_n: torch.Tensor
    exponential_np: torch.Tensor
    total_n: torch.Tensor
    column_n: torch.Tensor
    here_n: torch.Tensor
    choice_n: torch.Tensor | None
    highest_n: torch.Tensor

    @property
    def confidence_n(self) -> torch.Tensor:
        """Return the most likely token's probability: exp(0) / sum_j exp(logit_j - highest)."""
        return self.total_n.reciprocal()


def most_likely(
    logits_np: torch.Tensor, highest_n: torch.Tensor, shard: VocabularyShard
) -> torch.Tensor:
    """Return the id of each most likely token [n], int32; ``highest_n`` is its logit.

    Collective: where the vocabulary is split one all-reduce over ``shard.group``, of n int32.
    """
    # larger than every id, so that the minimum over ranks is the lowest id with the highest logit
    no_choice = torch.iinfo(torch.int32).max
    if not logits_np.size(1):
        choice = torch.full_like(highest_n, no_choice, dtype=torch.int32)
    else:
        column = logits_np.argmax(dim=1)
        here = (
            pick(logits_np, column).float() == highest_n
            if shard.is_split
            else torch.ones_like(column, dtype=torch.bool)
        )
        choice = torch.where(here, column + shard.first, no_choice).int()
    if shard.is_split:
        dist.all_reduce(choice, op=dist.ReduceOp.MIN, group=shard.group)
    return choice


def column_of(labels_n: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each label's column in this rank's shard, and whether this shard holds it.

    The column is 0 where another rank's shard holds the label.
    """
    column = labels_n - shard.first
    here = (column >= 0) & (column < shard.size)
    return torch.where(here, column, 0), here


def pick(values_np: torch.Tensor, column_n: torch.Tensor) -> torch.Tensor:
    """Return the value of each row at the row's column; shapes [n, p], [n], result [n]."""
    return values_np.gather(1, column_n[:, None]).squeeze(1)


def gather_counted(
    normed_tbh: torch.Tensor, targets: Targets, shard: VocabularyShard
) -> tuple[torch.Tensor, torch.Size]:
    """Return the counted tokens' hidden states [n, h], and the shape of all tokens' [s, b, h].

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
    """The negative log likelihood of each label; a ``TokenLoss``.

    Source: vocabulary-parallel cross entropy of Megatron-LM (Shoeybi et al., arXiv 1909.08053,
        section 3): only a maximum and two sums per token cross the network, never logits.
    """

    measures: tuple[str, ...] = ()

    def __init__(self, request: LossRequest):
        self.request = request

    def begin(self) -> None:
        """Do nothing."""

    def prepare(self, span: slice, buffer_np: torch.Tensor) -> None:
        """Do nothing."""

    def losses(self, span: slice, logits_np: torch.Tensor, work_np: torch.Tensor) -> TokenChunk:
        """Return the chunk; ``work_np`` (fp32, may be ``logits_np`` itself) is overwritten.

        Collective: where the vocabulary is split two all-reduces over ``shard.group``, of n and 2n
            floats; with the choice a third of n int32.
        """
        shard, labels_n = self.request.shard, self.request.targets.labels_n[span]
        has_rows = logits_np.size(1) > 0  # a shard may hold padding only
        highest = (
            logits_np.amax(dim=1).float()
            if has_rows
            else work_np.new_full((labels_n.numel(),), float("-inf"))
        )
        if shard.is_split:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.group)
        # before the logits are overwritten
        choice = most_likely(logits_np, highest, shard) if self.request.with_choice else None
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
        # the label is a most likely token where its logit equals the highest one
        return TokenChunk(
            total.log() - target, target >= 0, work_np, total, column, here, choice, highest
        )

    def gradient(
        self, chunk: TokenChunk, scale_n: torch.Tensor, out_np: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of ``sum(scale * loss)`` to the logits, written to ``out_np``.

        ``out_np`` may be ``chunk.exponential_np`` itself. The gradient is
        scale * (probability - [token is the label]). Normalising, scaling and rounding to the dtype
        of ``out_np`` are one pass over the chunk; the label's element is computed before rounding.
        """
        factor_n = scale_n / chunk.total_n
        if not out_np.size(1):
            return out_np
        at_label_n = pick(chunk.exponential_np, chunk.column_n) * factor_n - scale_n * chunk.here_n
        torch.mul(chunk.exponential_np, factor_n[:, None], out=out_np)
        return out_np.scatter_(1, chunk.column_n[:, None], at_label_n[:, None].to(out_np.dtype))
