"""Norm, output matrix and cross entropy with their gradients in one pass over chunks of tokens.

All logits of a batch never exist: a chunk's logits become its loss, then in place its gradient, and are overwritten by the next
chunk. The vocabulary may be sharded over a tensor parallel group and the tokens over the same group (sequence parallelism).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim, _reduce_scatter_along_first_dim

from megatron_sorted.loss.gradient import GradientSink


class Reader(Protocol):
    """Makes of an exit's un-normed hidden state what its head reads; a norm is one."""

    def __call__(self, hidden_tbh: torch.Tensor) -> torch.Tensor:
        """Returns what the head reads; shape [t, b, h]."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Returns its parameters."""


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the vocabulary.

    Attributes:
        first: Id of the first token of the shard.
        size: Number of rows of the shard that are real tokens. Rows that only pad the vocabulary are left out of the softmax, so
            the model equals its export without padding.
        group: The tensor parallel group.
        sequence_parallel: Hidden states are sharded along the sequence over the same group.
    """

    first: int
    size: int
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    @property
    def is_split(self) -> bool:
        """Whether there is more than one shard."""
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
class ExitLoss:
    """What one exit says of one micro-batch, per counted token.

    Attributes:
        loss_n: The loss (nats), fp32.
        correct_n: Whether the label was the most likely token.
        choice_n: The most likely token, of equally likely ones the lowest id; int32. None unless asked for.
        confidence_n: Its probability, fp32. None unless asked for.
        kl_n: How far it is from its teacher (nats), fp32; see ``loss.distillation``. None without one.
    """

    loss_n: torch.Tensor
    correct_n: torch.Tensor
    choice_n: torch.Tensor | None = None
    confidence_n: torch.Tensor | None = None
    kl_n: torch.Tensor | None = None


class TokenLoss(Protocol):
    """What is computed of a chunk's logits. A chunk of its own kind (``Chunk`` or alike) carries it from loss to gradient."""

    def prepare(self, span: slice, buffer_np: torch.Tensor) -> None:
        """Does what comes before the logits of the tokens ``span`` exist; may use the buffer that they will be written to."""

    def losses(self, span: slice, logits_np: torch.Tensor, work_np: torch.Tensor, with_choice: bool) -> Any:
        """Returns the chunk; ``work_np`` (fp32, may be ``logits_np`` itself) is overwritten."""

    def gradient(self, chunk: Any, scale_n: torch.Tensor, out_np: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of ``sum(scale * loss)`` to the logits, written to ``out_np``, the logits' own memory."""


@dataclass(frozen=True)
class Chunk:
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
    kl_n: torch.Tensor | None = None


def most_likely(logits_np: torch.Tensor, highest_n: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """Returns the id of the most likely token, int32; ``highest_n`` is its logit.

    Collective: where the vocabulary is split one all-reduce over ``shard.group``, of n int32.
    """
    nobody = torch.iinfo(torch.int32).max
    if not logits_np.size(1):
        choice = torch.full_like(highest_n, nobody, dtype=torch.int32)
    else:
        column = logits_np.argmax(dim=1)
        here = pick(logits_np, column).float() == highest_n if shard.is_split else torch.ones_like(column, dtype=torch.bool)
        choice = torch.where(here, column + shard.first, nobody).int()
    if shard.is_split:
        dist.all_reduce(choice, op=dist.ReduceOp.MIN, group=shard.group)
    return choice


def _chunk_loss(logits_np: torch.Tensor, work_np: torch.Tensor, labels_n: torch.Tensor, shard: VocabularyShard,
                with_choice: bool = False) -> Chunk:
    """Returns the losses of one chunk; ``work_np`` (fp32, may be ``logits_np`` itself) is overwritten.

    Source: vocabulary-parallel cross entropy of Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3): only a maximum and
    two sums a token cross the network, never logits.

    Collective: two all-reduces over ``shard.group``, of n and 2n floats; ``with_choice`` a third of n int32.
    """
    has_rows = logits_np.size(1) > 0  # a shard may be made of padding only
    highest = logits_np.amax(dim=1).float() if has_rows else work_np.new_full((labels_n.numel(),), float("-inf"))
    if shard.is_split:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.group)
    choice = most_likely(logits_np, highest, shard) if with_choice else None  # before the logits are overwritten
    torch.sub(logits_np, highest[:, None], out=work_np)
    column, here = column_of(labels_n, shard)
    target = torch.where(here, pick(work_np, column), 0.0) if has_rows else torch.zeros_like(highest)
    total = work_np.exp_().sum(dim=1)
    if shard.is_split:
        both = torch.stack((target, total))
        dist.all_reduce(both, group=shard.group)
        target, total = both[0], both[1]
    return Chunk(total.log() - target, target >= 0, work_np, total, column, here, choice)


def column_of(labels_n: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the column of each label in this rank's shard (0 where it is another rank's), and whether it is this rank's."""
    column = labels_n - shard.first
    here = (column >= 0) & (column < shard.size)
    return torch.where(here, column, 0), here


def pick(values_np: torch.Tensor, column_n: torch.Tensor) -> torch.Tensor:
    """Returns one value of each row; shapes [n, p], [n], result [n]."""
    return values_np.gather(1, column_n[:, None]).squeeze(1)


def _chunk_gradient(chunk: Chunk, scale_n: torch.Tensor, out_np: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of ``sum(scale * loss)`` to the logits, written to ``out_np`` (may be ``chunk.exponential_np`` itself).

    It is scale * (probability - 1 at the label). Normalising, scaling and rounding to the dtype of ``out_np`` are one pass over
    the chunk; the label's element is computed apart, before rounding.
    """
    factor_n = scale_n / chunk.total_n
    if not out_np.size(1):
        return out_np
    at_label_n = pick(chunk.exponential_np, chunk.column_n) * factor_n - scale_n * chunk.here_n
    torch.mul(chunk.exponential_np, factor_n[:, None], out=out_np)
    return out_np.scatter_(1, chunk.column_n[:, None], at_label_n[:, None].to(out_np.dtype))


class CrossEntropy:
    """The loss of the label alone. Arguments as for every ``TokenLoss``: the tokens, the shard, the tokens of a chunk."""

    def __init__(self, targets: Targets, shard: VocabularyShard, chunk_tokens: int):
        self.targets, self.shard = targets, shard

    def prepare(self, span: slice, buffer_np: torch.Tensor) -> None:
        """Does nothing."""

    def losses(self, span: slice, logits_np: torch.Tensor, work_np: torch.Tensor, with_choice: bool) -> Chunk:
        """Returns the chunk.

        Collective: see ``_chunk_loss``.
        """
        return _chunk_loss(logits_np, work_np, self.targets.labels_n[span], self.shard, with_choice)

    def gradient(self, chunk: Chunk, scale_n: torch.Tensor, out_np: torch.Tensor) -> torch.Tensor:
        """Returns the gradient to the logits; see ``_chunk_gradient``."""
        return _chunk_gradient(chunk, scale_n, out_np)


def gather_counted(normed_tbh: torch.Tensor, targets: Targets, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Size]:
    """Returns the hidden states of the counted tokens [n, h], and the shape of those of all tokens [s, b, h].

    Collective: with sequence parallelism one all-gather of [s, b, h] over ``shard.group``.
    """
    full_sbh = normed_tbh.detach()
    if shard.sequence_parallel and shard.is_split:
        full_sbh = _gather_along_first_dim(full_sbh, group=shard.group)
    inputs_nh = full_sbh.reshape(-1, full_sbh.size(-1))
    if targets.index_n is not None:
        inputs_nh = inputs_nh.index_select(0, targets.index_n)
    return inputs_nh, full_sbh.shape


def exit_loss(
    hidden_tbh: torch.Tensor,
    norm: Reader,
    weight_ph: torch.nn.Parameter,
    targets: Targets,
    shard: VocabularyShard,
    chunk_tokens: int,
    factor: torch.Tensor | None = None,
    with_choice: bool = False,
    make_loss: Callable[[Targets, VocabularyShard, int], TokenLoss] = CrossEntropy,
    with_confidence: bool = False,
) -> tuple[ExitLoss, torch.Tensor | None]:
    """Returns the exit's losses and, when ``factor`` is given, the gradient of ``factor * sum(loss_mask * loss)`` to its input.

    Gradients of the norm and of the output matrix are added to the parameters directly (``GradientSink``). In place of the norm
    anything that makes of the hidden state what the head reads may stand: a norm with layers of the exit's own before it.

    ``with_choice`` the losses also hold each token's most likely token, ``with_confidence`` its probability; nothing else changes.
    ``make_loss`` makes what is computed of each chunk's logits.

    Collective: over ``shard.group`` where the vocabulary is split: two small all-reduces a chunk (three ``with_choice``, see
    ``_chunk_loss``), then for gradients one all-reduce of [n, h]; with sequence parallelism instead one all-gather and one
    reduce-scatter of [s, b, h]. Another ``make_loss`` adds its own.

    Shapes: hidden [t, b, h] un-normed, weight [p, h], result [t, b, h]; losses [n].
    """
    with torch.set_grad_enabled(factor is not None):
        leaf = hidden_tbh.detach().requires_grad_(factor is not None)
        normed_tbh = norm(leaf)
    inputs_nh, full_shape = gather_counted(normed_tbh, targets, shard)
    token_loss = make_loss(targets, shard, chunk_tokens)
    weight = weight_ph.detach()[: shard.size]
    num_tokens = targets.labels_n.numel()
    loss_n = torch.empty(num_tokens, dtype=torch.float32, device=hidden_tbh.device)
    correct_n = torch.empty(num_tokens, dtype=torch.bool, device=hidden_tbh.device)
    choice_n = torch.empty(num_tokens, dtype=torch.int32, device=hidden_tbh.device) if with_choice else None
    confidence_n = torch.empty_like(loss_n) if with_confidence else None
    kl_n = None
    d_inputs_nh = torch.empty_like(inputs_nh) if factor is not None else None
    sink = GradientSink(weight_ph)
    buffer = torch.empty(min(chunk_tokens, num_tokens), shard.size, dtype=inputs_nh.dtype, device=hidden_tbh.device)
    work = buffer if buffer.dtype == torch.float32 else torch.empty_like(buffer, dtype=torch.float32)
    for start in range(0, num_tokens, chunk_tokens):
        span = slice(start, min(start + chunk_tokens, num_tokens))
        x = inputs_nh[span]
        token_loss.prepare(span, buffer[: x.size(0)])
        logits = torch.mm(x, weight.t(), out=buffer[: x.size(0)])
        chunk = token_loss.losses(span, logits, work[: x.size(0)], with_choice)
        loss_n[span], correct_n[span] = chunk.loss_n, chunk.correct_n
        if chunk.kl_n is not None:
            kl_n = torch.empty_like(loss_n) if kl_n is None else kl_n
            kl_n[span] = chunk.kl_n
        if choice_n is not None:
            choice_n[span] = chunk.choice_n
        if confidence_n is not None:
            confidence_n[span] = chunk.total_n.reciprocal()  # exp(0) over the sum of exp(logit - highest logit)
        if factor is None:
            continue
        d_logits = token_loss.gradient(chunk, targets.loss_mask_n[span] * factor, out_np=logits)
        torch.mm(d_logits, weight, out=d_inputs_nh[span])
        sink.add_product(d_logits, x)
    losses = ExitLoss(loss_n, correct_n, choice_n, confidence_n, kl_n)
    if factor is None:
        return losses, None
    return losses, _through_norm(leaf, normed_tbh, norm, d_inputs_nh, full_shape, targets, shard)


def _through_norm(leaf, normed_tbh, norm, d_inputs_nh, full_shape, targets: Targets, shard: VocabularyShard) -> torch.Tensor:
    """Returns the gradient to the hidden state and adds the norm's own gradient.

    Collective: one all-reduce of [n, h], or with sequence parallelism one reduce-scatter of [s, b, h], over ``shard.group``.
    """
    scattered = shard.sequence_parallel and shard.is_split
    if shard.is_split and not scattered:
        dist.all_reduce(d_inputs_nh, group=shard.group)
    if targets.index_n is not None:
        d_full = torch.zeros(full_shape, dtype=d_inputs_nh.dtype, device=d_inputs_nh.device)
        d_full.view(-1, full_shape[-1]).index_copy_(0, targets.index_n, d_inputs_nh)
    else:
        d_full = d_inputs_nh.view(full_shape)
    d_normed = _reduce_scatter_along_first_dim(d_full, group=shard.group) if scattered else d_full
    parameters = [p for p in norm.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad_added_to_main_grad = False  # it may still say so of the micro-batch before (``deferred.ready_signals``)
    d_hidden, *d_parameters = torch.autograd.grad(normed_tbh, [leaf, *parameters], d_normed)
    for parameter, gradient in zip(parameters, d_parameters, strict=True):
        if not parameter.grad_added_to_main_grad:  # a fused kernel of Megatron's has added it by itself
            GradientSink(parameter).add(gradient)
    return d_hidden
