"""Exits whose loss is computed in backward: forward keeps the hidden state, which is alive anyway, and nothing else."""

from collections.abc import Callable

import torch
from megatron.core.utils import make_viewless_tensor

# Computes an exit's loss from its hidden state [t, b, h] and the factor of its gradient; returns the gradient [t, b, h].
ExitBackward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Makes of an exit's own gradient, which may be overwritten, and that of the deeper layers the one for the layers below; all [t, b, h].
Join = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ready_signals(parameters: tuple[torch.nn.Parameter, ...]) -> tuple[torch.Tensor, ...]:
    """Return placeholders that make Megatron's gradient hooks fire; the gradients themselves already lie in ``main_grad``.

    This is the protocol of Megatron's fused gradient accumulation (``grad_added_to_main_grad``). Memory of the placeholders is
    reserved but never written.
    """
    for parameter in parameters:
        parameter.grad_added_to_main_grad = True
    return tuple(torch.empty_like(parameter) for parameter in parameters)


class _Tap(torch.autograd.Function):
    """An exit below deeper layers: hands the hidden state on; backward joins the exit's gradient with the deeper layers'."""

    @staticmethod
    def forward(ctx, hidden, backward, factor, join, *announced):
        ctx.save_for_backward(hidden)
        ctx.exit_backward, ctx.factor, ctx.join, ctx.announced = backward, factor, join, announced
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, d_deeper):
        (hidden,) = ctx.saved_tensors
        gradient = (
            d_deeper
            if ctx.exit_backward is None
            else ctx.join(ctx.exit_backward(hidden, ctx.factor), d_deeper)
        )
        return gradient, None, None, None, *ready_signals(ctx.announced)


class _End(torch.autograd.Function):
    """The deepest exit of a model: a scalar for Megatron's schedule, whose incoming gradient is the factor of the loss rule."""

    @staticmethod
    def forward(ctx, hidden, backward, coefficient, *announced):
        ctx.save_for_backward(hidden)
        ctx.exit_backward, ctx.coefficient, ctx.announced = backward, coefficient, announced
        return torch.zeros((), dtype=torch.float32, device=hidden.device)

    @staticmethod
    def backward(ctx, d_loss):
        (hidden,) = ctx.saved_tensors
        trains = ctx.exit_backward is not None
        gradient = (
            ctx.exit_backward(hidden, d_loss * ctx.coefficient)
            if trains
            else torch.zeros_like(hidden)
        )
        return gradient, None, None, *ready_signals(ctx.announced)


def tap(
    hidden_tbh: torch.Tensor,
    backward: ExitBackward | None,
    factor: torch.Tensor | None,
    announced: tuple[torch.nn.Parameter, ...] = (),
    join: Join = torch.Tensor.add_,
) -> torch.Tensor:
    """Return the same hidden state, with an exit attached that is computed in backward.

    Args:
        hidden_tbh: Un-normed hidden state at the exit.
        backward: Computes the exit; None for an exit that does not train (then only ``announced`` matter).
        factor: Scale of the exit's gradient: coefficient times the factor of the loss rule in force.
        announced: Parameters whose gradient is complete once this exit has run backward; Megatron is told so.
        join: Puts the exit's gradient and the deeper layers' together.
    """
    out = _Tap.apply(hidden_tbh, backward, factor, join, *announced)
    # the function returned a view, and Megatron frees stage outputs only if they are none
    return make_viewless_tensor(inp=out, requires_grad=out.requires_grad, keep_graph=True)


def end(
    hidden_tbh: torch.Tensor,
    backward: ExitBackward | None,
    coefficient: float,
    announced: tuple[torch.nn.Parameter, ...] = (),
) -> torch.Tensor:
    """Return a scalar 0 that stands for the loss: its gradient, as Megatron's schedule scales it, is the loss rule's factor.

    Args:
        hidden_tbh: Un-normed hidden state of the deepest exit.
        backward: Computes the exit; None if it does not train.
        coefficient: The exit's coefficient.
        announced: As for ``tap``.
    """
    return _End.apply(hidden_tbh, backward, coefficient, *announced)
