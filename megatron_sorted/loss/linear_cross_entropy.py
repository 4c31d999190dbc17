"""Norm, output matrix and cross entropy with their gradients in one pass over chunks of tokens.

All logits of a batch never exist: a chunk's logits become its loss, then in place its gradient, and are overwritten by the next
chunk. The vocabulary may be sharded over a tensor parallel group and the tokens over the same group (sequence parallelism).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import _reduce_scatter_along_first_dim

from megatron_sorted.loss.cross_entropy import CrossEntropy, Targets, TokenLoss, VocabularyShard, gather_counted
from megatron_sorted.loss.gradient import GradientSink


class Reader(Protocol):
    """Makes of an exit's un-normed hidden state what its head reads; a norm is one."""

    def __call__(self, hidden_tbh: torch.Tensor) -> torch.Tensor:
        """Returns what the head reads; shape [t, b, h]."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Returns its parameters."""


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
    ``CrossEntropy.losses``), then for gradients one all-reduce of [n, h]; with sequence parallelism instead one all-gather and one
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
