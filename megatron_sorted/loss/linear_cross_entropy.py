"""Norm, output matrix and cross entropy with their gradients, in one pass over chunks of tokens.

For a chunk of n tokens with normed hidden states X [n, h], output matrix W [v, h], labels y and the
scale s of each token's loss,

    logits  Z = X W^T                              [n, v]
    loss    l_i = log sum_j exp(Z_ij) - Z_{i, y_i}
    dZ_ij = s_i (exp(Z_ij) / sum_k exp(Z_ik) - [j = y_i])
    dX = dZ W,    dW += dZ^T X

Z, its exponentials and dZ share the same memory, and the next chunk overwrites it; so the logits of
a whole batch never exist. The vocabulary may be sharded over a tensor parallel group, and the
tokens over the same group (sequence parallelism).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import _reduce_scatter_along_first_dim

from megatron_sorted.loss.cross_entropy import LossRequest, TokenLoss, gather_counted
from megatron_sorted.loss.gradient import GradientSink


class NormLike(Protocol):
    """The modules between an exit's un-normed hidden state and its output matrix.

    That is a norm, or a norm after layers of the exit's own.
    """

    def __call__(self, hidden_tbh: torch.Tensor) -> torch.Tensor:
        """Return the input of the output matrix; shape [t, b, h]."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return the parameters of these modules."""


@dataclass(frozen=True)
class ExitLoss:
    """Results of one exit for one micro-batch, one value per counted token.

    Attributes:
        loss_n: The loss (nats), fp32.
        correct_n: Whether the label was the most likely token.
        choice_n: The most likely token, of equally likely ones the lowest id; int32. None unless
            requested.
        confidence_n: Probability of the most likely token, fp32. None unless requested.
        kl_n: Divergence from the exit's teacher, or from its choice (nats), fp32; see
            ``loss.distillation`` and ``loss.taught_choice``. None without a teacher.
        agree_n: Whether the teacher's choice is a most likely token of the exit. None unless the
            exit learns the choice.
    """

    loss_n: torch.Tensor
    correct_n: torch.Tensor
    choice_n: torch.Tensor | None = None
    confidence_n: torch.Tensor | None = None
    kl_n: torch.Tensor | None = None
    agree_n: torch.Tensor | None = None

    @classmethod
    def empty(cls, token_loss: TokenLoss, device: torch.device) -> "ExitLoss":
        """Allocate the tensors that ``token_loss`` fills chunk by chunk."""
        request = token_loss.request
        num_tokens = request.targets.labels_n.numel()

        def make(dtype: torch.dtype, is_wanted: bool = True) -> torch.Tensor | None:
            return torch.empty(num_tokens, dtype=dtype, device=device) if is_wanted else None

        return cls(
            make(torch.float32),
            make(torch.bool),
            make(torch.int32, request.with_choice),
            make(torch.float32, request.with_confidence),
            make(torch.float32, "kl_n" in token_loss.measures),
            make(torch.bool, "agree_n" in token_loss.measures),
        )

    def put(self, span: slice, chunk: Any) -> None:
        """Write a chunk's results to its place among all tokens."""
        for name, whole in vars(self).items():
            if whole is not None:
                whole[span] = getattr(chunk, name)


def exit_loss(
    hidden_tbh: torch.Tensor,
    norm: NormLike,
    weight_ph: torch.nn.Parameter,
    token_loss: TokenLoss,
    factor: torch.Tensor | None = None,
) -> tuple[ExitLoss, torch.Tensor | None]:
    """Return the exit's losses and, when ``factor`` is given, the gradient to its input.

    The gradient is that of ``factor * sum(loss_mask * loss)``. Gradients of the norm and of the
    output matrix are added to the parameters directly (``GradientSink``).

    Collective: over ``shard.group`` where the vocabulary is split: two small all-reduces a chunk
        (three with the choice, see ``CrossEntropy.losses``), then for gradients one all-reduce of
        [n, h]; with sequence parallelism instead one all-gather and one reduce-scatter of
        [s, b, h]. Another ``token_loss`` adds its own.

    Shapes: hidden [t, b, h] un-normed, weight [p, h], result [t, b, h]; losses [n].

    Args:
        hidden_tbh: Un-normed hidden state at the exit.
        norm: The exit's norm, perhaps after layers of the exit's own.
        weight_ph: The output matrix; rows beyond ``shard.size`` only pad it.
        token_loss: The loss to compute.
        factor: Scale of the gradient, a scalar on the device; None to compute losses alone.
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
    # the only memory for logits: in the dtype of the inputs, and the same in fp32 for exponentials
    buffer = inputs_nh.new_empty(min(request.chunk_tokens, num_tokens), shard.size)
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
    leaf_tbh: torch.Tensor,
    normed_tbh: torch.Tensor,
    norm: NormLike,
    d_inputs_nh: torch.Tensor,
    full_shape: torch.Size,
    request: LossRequest,
) -> torch.Tensor:
    """Return the gradient to the hidden state, and add the norm's own gradient.

    Collective: over ``shard.group`` where the vocabulary is split: one all-reduce of [n, h], or
        with sequence parallelism one reduce-scatter of [s, b, h].
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
        # ``deferred.ready_signals`` may have set it for the micro-batch before
        parameter.grad_added_to_main_grad = False
    d_hidden, *d_parameters = torch.autograd.grad(normed_tbh, [leaf_tbh, *parameters], d_normed)
    for parameter, gradient in zip(parameters, d_parameters, strict=True):
        # a fused kernel of Megatron's sets it when it has added the gradient by itself
        if not parameter.grad_added_to_main_grad:
            GradientSink(parameter).add(gradient)
    return d_hidden
