"""Exits whose loss is computed in backward.

An exit needs only the hidden state h_d after its layers, which the layers above keep alive anyway.
So forward stores nothing for an exit below deeper layers: ``tap`` puts an identity function into
the graph at h_d. When backward arrives there with the gradient of all deeper exits,

    dL/dh_d = join(c_d * dL_d/dh_d, gradient of the deeper exits)        (``join`` is + by default)

the function computes loss, logits and gradients of this one exit, frees them, and passes the
gradient on to the layers below. Exits run from deep to shallow, one at a time, and logits exist for
one chunk of tokens only. The deepest exit (``end``) is the scalar on which Megatron's schedule
calls backward.
"""

from collections.abc import Callable

import torch
from megatron.core.utils import make_viewless_tensor

ExitBackward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Computes an exit from its hidden state [t, b, h] and the scale of its gradient, a scalar.

Adds the gradients of the exit's parameters and returns the gradient to the hidden state [t, b, h].
"""

Join = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Combines an exit's own gradient, which may be overwritten, with that of the deeper exits.

Returns the gradient for the layers below; all [t, b, h].
"""


def ready_signals(parameters: tuple[torch.nn.Parameter, ...]) -> tuple[torch.Tensor, ...]:
    """Return placeholder gradients that make Megatron's gradient hooks of ``parameters`` fire.

    The gradients themselves already stand in ``main_grad``. This is the protocol of Megatron's
    fused gradient accumulation (``grad_added_to_main_grad``). Memory of the placeholders is
    reserved but never written.
    """
    for parameter in parameters:
        parameter.grad_added_to_main_grad = True
    return tuple(torch.empty_like(parameter) for parameter in parameters)


class _Tap(torch.autograd.Function):
    """An exit below deeper layers: the identity in forward, the whole exit in backward."""

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
    """The deepest exit of a model: a scalar 0 in forward, the whole exit in backward."""

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
        backward: Computes the exit; None for an exit that does not train, which then only
            announces its parameters.
        factor: Scale of the exit's gradient: its coefficient times the scale that Megatron applies
            to losses; None where ``backward`` is.
        announced: Parameters whose gradient is complete once this exit has run backward; Megatron's
            gradient hooks fire for them.
        join: Combines the exit's gradient with that of the deeper exits.
    """
    out = _Tap.apply(hidden_tbh, backward, factor, join, *announced)
    # an autograd function returns a view, and Megatron frees a stage's output only if it is none
    return make_viewless_tensor(inp=out, requires_grad=out.requires_grad, keep_graph=True)


def end(
    hidden_tbh: torch.Tensor,
    backward: ExitBackward | None,
    coefficient: float,
    announced: tuple[torch.nn.Parameter, ...] = (),
) -> torch.Tensor:
    """Return a scalar 0 that takes the place of the loss in Megatron's schedule.

    Its incoming gradient is the scale that the schedule applies to losses (1 / number of
    micro-batches, fp16's loss scale, ...); times ``coefficient`` it is the scale of the exit's
    gradient. The loss itself is known only after backward.

    Args:
        hidden_tbh: Un-normed hidden state of the deepest exit.
        backward: Computes the exit; None if it does not train.
        coefficient: The exit's coefficient.
        announced: Parameters whose gradient is complete then, see ``tap``.
    """
    return _End.apply(hidden_tbh, backward, coefficient, *announced)
