"""Norm, output matrix and cross entropy with their gradients in one pass over chunks of tokens.

All logits of a batch never exist: a chunk's logits become its loss, then in place its gradient, and are overwritten by the next
chunk. The vocabulary may be sharded over a tensor parallel group and the tokens over the same group (sequence parallelism).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim, _reduce_scatter_along_first_dim

from megatron_sorted.loss.gradient import GradientSink


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
    """What one exit says of one micro-batch: per counted token its loss (nats) and whether its label was the most likely token."""

    loss_n: torch.Tensor
    correct_n: torch.Tensor


def _chunk_loss(logits: torch.Tensor, labels: torch.Tensor, shard: VocabularyShard):
    """Returns loss, correctness and softmax (in place of ``logits``) of one chunk; labels outside the shard are another rank's.

    Source: vocabulary-parallel cross entropy of Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3): only a maximum and
    two sums a token cross the network, never logits.

    Collective: two all-reduces over ``shard.group``, of n and 2n floats.
    """
    if logits.size(1):
        highest = logits.amax(dim=1)
    else:  # a shard made of padding only
        highest = logits.new_full((logits.size(0),), float("-inf"))
    if shard.is_split:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.group)
    logits.sub_(highest[:, None])
    local = labels - shard.first
    here = (local >= 0) & (local < shard.size)
    local = torch.where(here, local, 0)
    rows = torch.arange(labels.numel(), device=labels.device)
    target = torch.where(here, logits[rows, local], 0.0) if logits.size(1) else torch.zeros_like(highest)
    softmax = logits.exp_()
    total = softmax.sum(dim=1)
    if shard.is_split:
        both = torch.stack((target, total))
        dist.all_reduce(both, group=shard.group)
        target, total = both[0], both[1]
    softmax.div_(total[:, None])
    return total.log() - target, target >= 0, softmax, rows, local, here


def exit_loss(
    hidden_tbh: torch.Tensor,
    norm: torch.nn.Module,
    weight_ph: torch.nn.Parameter,
    targets: Targets,
    shard: VocabularyShard,
    chunk_tokens: int,
    factor: torch.Tensor | None = None,
) -> tuple[ExitLoss, torch.Tensor | None]:
    """Returns the exit's losses and, when ``factor`` is given, the gradient of ``factor * sum(loss_mask * loss)`` to its input.

    Gradients of the norm and of the output matrix are added to the parameters directly (``GradientSink``).

    Collective: over ``shard.group`` where the vocabulary is split: two small all-reduces a chunk (``_chunk_loss``), then for
    gradients one all-reduce of [n, h]; with sequence parallelism instead one all-gather and one reduce-scatter of [s, b, h].

    Shapes: hidden [t, b, h] un-normed, weight [p, h], result [t, b, h]; loss and correctness [n].
    """
    with torch.set_grad_enabled(factor is not None):
        leaf = hidden_tbh.detach().requires_grad_(factor is not None)
        normed_tbh = norm(leaf)
    full_sbh = normed_tbh.detach()
    if shard.sequence_parallel and shard.is_split:
        full_sbh = _gather_along_first_dim(full_sbh, group=shard.group)
    inputs_nh = full_sbh.reshape(-1, full_sbh.size(-1))
    if targets.index_n is not None:
        inputs_nh = inputs_nh.index_select(0, targets.index_n)
    weight = weight_ph.detach()[: shard.size]
    num_tokens = targets.labels_n.numel()
    loss_n = torch.empty(num_tokens, dtype=torch.float32, device=hidden_tbh.device)
    correct_n = torch.empty(num_tokens, dtype=torch.bool, device=hidden_tbh.device)
    d_inputs_nh = torch.empty_like(inputs_nh) if factor is not None else None
    sink = GradientSink(weight_ph)
    buffer = torch.empty(min(chunk_tokens, num_tokens), shard.size, dtype=inputs_nh.dtype, device=hidden_tbh.device)
    for start in range(0, num_tokens, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, num_tokens))
        x = inputs_nh[chunk]
        logits = torch.mm(x, weight.t(), out=buffer[: x.size(0)]).float()
        loss_n[chunk], correct_n[chunk], d_logits, rows, local, here = _chunk_loss(logits, targets.labels_n[chunk], shard)
        if factor is None:
            continue
        if shard.size:
            d_logits[rows, local] -= here.to(d_logits.dtype)
        d_logits.mul_((targets.loss_mask_n[chunk] * factor)[:, None])
        d_logits = d_logits.to(x.dtype)
        torch.mm(d_logits, weight, out=d_inputs_nh[chunk])
        sink.add_product(d_logits, x)
    losses = ExitLoss(loss_n, correct_n)
    if factor is None:
        return losses, None
    return losses, _through_norm(leaf, normed_tbh, norm, d_inputs_nh, full_sbh.shape, targets, shard)


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
    d_hidden, *d_parameters = torch.autograd.grad(normed_tbh, [leaf, *parameters], d_normed)
    for parameter, gradient in zip(parameters, d_parameters, strict=True):
        GradientSink(parameter).add(gradient)
    return d_hidden
