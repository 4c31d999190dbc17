"""Exits of a network that does not train below them: they are attached to the stage's output and run in its backward.

Where nothing below an exit trains, no gradient passes through its hidden state, so layers are run
without building a graph and keep no activations. But a schedule calls backward on the output of a
stage, and from every stage but the first it wants a gradient for the one before. So what the stage
hands on is tied to its input by a function whose backward computes the exits and returns a gradient
of zero.
"""

from dataclasses import dataclass

import torch
from megatron.core.utils import make_viewless_tensor

from megatron_sorted.loss.deferred import ExitBackward, ready_signals


@dataclass(frozen=True)
class AttachedExit:
    """One exit attached to a stage's output.

    Attributes:
        hidden_tbh: Un-normed hidden state at the exit; wants no gradient.
        backward: Computes the exit; None if it does not train.
        factor: Scale of its gradient, as for ``deferred.tap``.
        announced: Parameters whose gradient is complete then, as for ``deferred.tap``.
    """

    hidden_tbh: torch.Tensor
    backward: ExitBackward | None
    factor: torch.Tensor
    announced: tuple[torch.nn.Parameter, ...]


class _Attach(torch.autograd.Function):
    """Hands the output on; backward computes the exits, from deep to shallow as everywhere, and sends zero to the anchor."""

    @staticmethod
    def forward(ctx, output, anchor, exits, *announced):
        ctx.save_for_backward(*(one.hidden_tbh for one in exits))
        ctx.exits = tuple((one.backward, one.factor) for one in exits)
        ctx.anchor, ctx.announced = (anchor.shape, anchor.dtype, anchor.device), announced
        return output.view_as(output)

    @staticmethod
    def backward(ctx, d_output):
        for hidden, (exit_backward, factor) in zip(
            reversed(ctx.saved_tensors), reversed(ctx.exits), strict=True
        ):
            if exit_backward is not None:
                exit_backward(hidden, factor)  # its gradient to the hidden state goes nowhere
        shape, dtype, device = ctx.anchor
        d_anchor = torch.zeros(shape, dtype=dtype, device=device)
        return (
            d_output if ctx.needs_input_grad[0] else None,
            d_anchor,
            None,
            *ready_signals(ctx.announced),
        )


def attach_exits(
    output: torch.Tensor, anchor: torch.Tensor | None, exits: list[AttachedExit]
) -> torch.Tensor:
    """Return the same output of a stage with exits attached, and wanting a gradient so that the schedule runs its backward.

    Args:
        output: Hidden state [t, b, h] or the scalar a network ends in.
        anchor: Input of the stage, which receives a gradient of zero; None on the first stage.
        exits: From shallow to deep. They run before every tap of the stage.
    """
    if anchor is None:
        anchor = torch.empty((), device=output.device, requires_grad=True)
    announced = [parameter for one in exits for parameter in one.announced]
    out = _Attach.apply(output, anchor, exits, *announced)
    # the function returned a view, which schedules neither free nor divide in place
    return make_viewless_tensor(inp=out, requires_grad=out.requires_grad, keep_graph=True)
