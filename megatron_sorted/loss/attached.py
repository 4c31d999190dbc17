"""Exits over frozen layers: they are attached to the stage's output and run in its backward.

Where nothing below an exit trains, no gradient passes through its hidden state, so the layers run
without a graph and keep no activations. But a pipeline schedule calls backward on a stage's output,
and every stage but the first owes the stage before a gradient. So the stage's output is connected
to its input by a function whose backward computes the exits and returns a gradient of zero.
"""

from dataclasses import dataclass

import torch
from megatron.core.utils import make_viewless_tensor

from megatron_sorted.loss.deferred import ExitBackward, ready_signals


@dataclass(frozen=True)
class AttachedExit:
    """One exit attached to a stage's output.

    Attributes:
        hidden_tbh: Un-normed hidden state at the exit, which requires no gradient.
        backward: Computes the exit; None if it does not train.
        factor: Scale of its gradient, see ``deferred.tap``.
        announced: Parameters whose gradient is complete then, see ``deferred.tap``.
    """

    hidden_tbh: torch.Tensor
    backward: ExitBackward | None
    factor: torch.Tensor
    announced: tuple[torch.nn.Parameter, ...]


class _Attach(torch.autograd.Function):
    """The identity on the output; its backward computes the exits and sends zero to the anchor."""

    @staticmethod
    def forward(ctx, output, anchor, exits, *announced):
        ctx.save_for_backward(*(one.hidden_tbh for one in exits))
        ctx.exits = tuple((one.backward, one.factor) for one in exits)
        ctx.anchor, ctx.announced = (anchor.shape, anchor.dtype, anchor.device), announced
        return output.view_as(output)

    @staticmethod
    def backward(ctx, d_output):
        # from deep to shallow, the order in which taps run
        for hidden, (exit_backward, factor) in zip(
            reversed(ctx.saved_tensors), reversed(ctx.exits), strict=True
        ):
            if exit_backward is not None:
                exit_backward(hidden, factor)  # its gradient to the hidden state is not needed
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
    """Return the same output of a stage with exits attached that are computed in its backward.

    The result requires a gradient, so that the schedule runs its backward.

    Args:
        output: Hidden state [t, b, h], or the scalar that a network ends in.
        anchor: Input of the stage, which receives a gradient of zero; None on the first stage.
        exits: The exits from shallow to deep. They run before every tap of the stage.
    """
    if anchor is None:
        anchor = torch.empty((), device=output.device, requires_grad=True)
    announced = [parameter for one in exits for parameter in one.announced]
    out = _Attach.apply(output, anchor, exits, *announced)
    # an autograd function returns a view, which schedules neither free nor divide in place
    return make_viewless_tensor(inp=out, requires_grad=out.requires_grad, keep_graph=True)
