"""How the teacher of a micro-batch, the last exit's normed hidden state, comes to the exits of earlier stages before they need it.

Exits are computed in backward, which passes the stages from the last to the first; so the teacher travels with the gradient. Between
stages the hidden state is given a second half along the sequence, the carrier. Forward, the carrier holds zeros, or the hidden state of a
teacher that is a model of its own (``training.teacher``). Backward, what Megatron's schedule takes for the carrier's gradient is the
teacher: each stage takes it out of the gradient it receives and puts it into the one it sends. So every schedule that is right for the
hidden state is right for the teacher, with no message of our own. A message has twice the bytes, and what the schedule keeps of the
messages too. Evaluation, which has no backward, sends hidden states alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_sorted.loss.deferred import ExitBackward
from megatron_sorted.settings.derived import taught_exits
from megatron_sorted.settings.run import Settings


@dataclass
class TeacherSlot:
    """Where a chunk keeps the teacher of one micro-batch while its backward runs.

    Attributes:
        normed_tbh: The last exit's hidden state after its norm; in the dtype of the pipeline's messages, never scaled.
        hidden_tbh: On the way forward, the hidden state of a teacher that is a model of its own.
    """

    normed_tbh: torch.Tensor | None = None
    hidden_tbh: torch.Tensor | None = None


class _Narrow(torch.autograd.Function):
    """A chunk's input without the carrier; backward puts the teacher into the carrier's gradient and forgets it."""

    @staticmethod
    def forward(ctx, wide, box):
        ctx.box = box
        hidden, box.hidden_tbh = wide.chunk(2)
        return hidden

    @staticmethod
    def backward(ctx, d_hidden):
        wide = torch.cat((d_hidden, ctx.box.normed_tbh))
        ctx.box.normed_tbh = None
        return wide, None


class _Widen(torch.autograd.Function):
    """A chunk's output with a carrier; backward takes the teacher out of the carrier's gradient."""

    @staticmethod
    def forward(ctx, hidden, box):
        ctx.box = box
        wide = hidden.new_empty(2 * hidden.size(0), *hidden.shape[1:])
        wide[: hidden.size(0)].copy_(hidden)
        carrier, box.hidden_tbh = box.hidden_tbh, None
        wide[hidden.size(0) :] = 0 if carrier is None else carrier
        return wide

    @staticmethod
    def backward(ctx, d_wide):
        d_hidden, ctx.box.normed_tbh = d_wide.chunk(2)
        return d_hidden, None


def halves_of_message(settings: Settings, depths: Iterable[int], forward_only: bool = False) -> int:
    """Return 2 where stages send each other a carrier beside the hidden state, at a step that trains the exits at ``depths``; else 1."""
    return (
        2
        if settings.pipeline_model_parallel_size > 1
        and not forward_only
        and taught_exits(settings, depths)
        else 1
    )


def narrow(wide_tbh: torch.Tensor, box: TeacherSlot) -> torch.Tensor:
    """Return the hidden state [t, b, h] of a message [2t, b, h]; in backward the teacher in ``box`` travels on.

    ``box`` gets what the carrier holds now.
    """
    return _Narrow.apply(wide_tbh, box)


def widen(hidden_tbh: torch.Tensor, box: TeacherSlot) -> torch.Tensor:
    """Return a message [2t, b, h] of a hidden state [t, b, h]; in backward the teacher comes into ``box``.

    The carrier is ``box.hidden_tbh``, or zeros.
    """
    return _Widen.apply(hidden_tbh, box)


def teach(backward: ExitBackward | None, norm: torch.nn.Module, box: TeacherSlot) -> ExitBackward:
    """Return the last exit's backward that first puts the teacher into ``box``; ``backward`` is None where the exit does not train."""

    def teach_and_compute(hidden_tbh: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            box.normed_tbh = norm(hidden_tbh)
        return torch.zeros_like(hidden_tbh) if backward is None else backward(hidden_tbh, factor)

    return teach_and_compute
