"""Norm, output matrix and cross entropy with their gradients in one pass over chunks of tokens.

All logits of a batch never exist: a chunk's logits become its loss, then in place its gradient, and
    are overwritten by the next
chunk. The vocabulary may be sharded over a tensor parallel group and the tokens over the same group
(sequence parallelism).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import _reduce_scatter_along_first_dim

from megatron_sorted.loss.cross_entropy import LossRequest, TokenLoss, gather_counted
from megatron_sorted.loss.gradient import GradientSink


class Readout(Protocol):
    """Makes of an exit's un-normed hidden state what its head reads; a norm is one."""

    def __call__(self, hidden_tbh: torch.Tensor) -> torch.Tensor:
        """Return what the head reads; shape [t, b, h]."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return its parameters."""


@dataclass(frozen=True)
class ExitLoss:
    """What one exit computed for one micro-batch, per counted token.

    Attributes:
        loss_n: The loss (nats), fp32.
        correct_n: Whether the label was the most likely token.
        choice_n: The most likely token, of equally likely ones the lowest id; int32. None unless
            requested.
        confidence_n: Its probability, fp32. None unless requested.
        kl_n: How far it is from its teacher (nats), fp32; see ``loss.distillation``. None without
            one.
    """

    loss_n: torch.Tensor
    correct_n: torch.Tensor
    choice_n: torch.Tensor | None = None
    confidence_n: torch.Tensor | None = None
    kl_n: torch.Tensor | None = None

    @classmethod
    def empty(cls, token_loss: TokenLoss, device: torch.device) -> "ExitLoss":
        """Return the tensors that ``token_loss`` fills, chunk by chunk."""
        request = token_loss.request

        def make(dtype: torch.dtype, is_wanted: bool = True) -> torch.Tensor | None:
            return (
                torch.empty(request.targets.labels_n.numel(), dtype=dtype, device=device)
                if is_wanted
                else None
            )

        return cls(
            make(torch.float32),
            make(torch.bool),
            make(torch.int32, request.with_choice),
            make(torch.float32, request.with_confidence),
            make(torch.float32, token_loss.has_teacher),
        )

    def put(self, span: slice, chunk: Any) -> None:
        """Take in what a chunk of tokens says."""
        for name, whole in vars(self).items():
            if whole is not None:
                whole[span] = getattr(chunk, name)


def exit_loss(
    hidden_tbh: torch.Tensor,
    norm: Readout,
    weight_ph: torch.nn.Parameter,
    token_loss: TokenLoss,
    factor: torch.Tensor | None = None,
) -> tuple[ExitLoss, torch.Tensor | None]:
    """Return the exit's losses and, when ``factor`` is given, the gradient to its input.

    That is the gradient of ``factor * sum(loss_mask * loss)``.

    Gradients of the norm and of the output matrix are added to the parameters directly
    (``GradientSink``). In place of the norm
    anything that makes of the hidden state what the head reads may stand: a norm with layers of the
        exit's own before it.

    Collective: over ``shard.group`` where the vocabulary is split: two small all-reduces a chunk
        (three with the choice, see
    ``CrossEntropy.losses``), then for gradients one all-reduce of [n, h]; with sequence parallelism
    instead one all-gather and one reduce-scatter of [s, b, h]. Another ``token_loss`` adds its own.

    Shapes: hidden [t, b, h] un-normed, weight [p, h], result [t, b, h]; losses [n].
    """
    request = token_loss.request
    targets, shard, num_tokens = request.targets, request.shard, request.targets.labels_n.numel()
    with torch.set_grad_enabled(factor is not None):
        leaf = hidden_tbh.detach().requires_grad_(factor is not None)
        normed_tbh = norm(leaf)
    inputs_nh, full_shape = gather_counted(normed_tbh, targets, shard)
    token_loss.begin()
    weight = weight_ph.detach()[: shard.size]
    losses = ExitLoss.empty(token_loss, hidden_tbh.device)
    d_inputs_nh = torch.empty_like(inputs_nh) if factor is not None else None
    sink = GradientSink(weight_ph)
    buffer = torch.empty(
        min(request.chunk_tokens, num_tokens),
        shard.size,
        dtype=inputs_nh.dtype,
        device=hidden_tbh.device,
    )
    work = (
        buffer if buffer.dtype == torch.float32 else torch.empty_like(buffer, dtype=torch.float32)
    )
    for start in range(0, num_tokens, request.chunk_tokens):
        span = slice(start, min(start + request.chunk_tokens, num_tokens))
        x = inputs_nh[span]
        token_loss.prepare(span, buffer[: x.size(0)])
        logits = torch.mm(x, weight.t(), out=buffer[: x.size(0)])
        chunk = token_loss.losses(span, logits, work[: x.size(0)])
        losses.put(span, chunk)
        if factor is None:
            continue
        d_logits = token_loss.gradient(chunk, targets.loss_mask_n[span] * factor, out_np=logits)
        torch.mm(d_logits, weight, out=d_inputs_nh[span])
        sink.add_product(d_logits, x)
    if factor is None:
        return losses, None
    return losses, _through_norm(leaf, normed_tbh, norm, d_inputs_nh, full_shape, request)


def _through_norm(
    leaf, normed_tbh, norm, d_inputs_nh, full_shape, request: LossRequest
) -> torch.Tensor:
    """Return the gradient to the hidden state and add the norm's own gradient.

    Collective: one all-reduce of [n, h], or with sequence parallelism one reduce-scatter of [s, b,
        h], over ``shard.group``.
    """
    targets, shard = request.targets, request.shard
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
        parameter.grad_added_to_main_grad = (
            False  # it may still say so of the micro-batch before (``deferred.ready_signals``)
        )
    d_hidden, *d_parameters = torch.autograd.grad(normed_tbh, [leaf, *parameters], d_normed)
    for parameter, gradient in zip(parameters, d_parameters, strict=True):
        if (
            not parameter.grad_added_to_main_grad
        ):  # a fused kernel of Megatron's has added it by itself
            GradientSink(parameter).add(gradient)
    return d_hidden
