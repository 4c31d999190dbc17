"""The carrier: the half of a pipeline message that brings the teacher to earlier stages.

The teacher of a micro-batch is the normed hidden state of the last exit, or of a frozen model.
Exits are computed in backward, which passes the stages from the last to the first; so the teacher
is sent with the gradient. Between stages the hidden state is given a second half along the
sequence, the carrier. In forward, the carrier holds zeros, or the hidden state of a frozen teacher
(``training.step.teacher``). In backward, what Megatron's schedule takes for the carrier's gradient
is the teacher: each stage removes it from the gradient it receives and puts it into the one it
sends. So every schedule that is right for the hidden state is right for the teacher, and we send no
messages of our own. Messages, and what the schedule keeps of them, take twice the bytes.
Evaluation, which has no backward, sends hidden states alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_sorted.loss.deferred import ExitBackward
from megatron_sorted.settings.derived import taught_exits
from megatron_sorted.settings.run import Settings


@dataclass
class TeacherSlot:
    """The place where a chunk keeps the teacher of one micro-batch while its backward runs.

    Attributes:
        normed_tbh: The teacher's hidden state after its norm, in the dtype of the pipeline's
            messages; never scaled.
        hidden_tbh: In forward, the running hidden state of a frozen teacher.
    """

    normed_tbh: torch.Tensor | None = None
    hidden_tbh: torch.Tensor | None = None


class _Narrow(torch.autograd.Function):
    """A chunk's input without the carrier; backward makes the teacher the carrier's gradient."""

    @staticmethod
    def forward(ctx, wide, slot):
        ctx.slot = slot
        hidden, slot.hidden_tbh = wide.chunk(2)
        return hidden

    @staticmethod
    def backward(ctx, d_hidden):
        wide = torch.cat((d_hidden, ctx.slot.normed_tbh))
        ctx.slot.normed_tbh = None
        return wide, None


class _Widen(torch.autograd.Function):
    """A chunk's output with a carrier; backward takes the teacher from the carrier's gradient."""

    @staticmethod
    def forward(ctx, hidden, slot):
        ctx.slot = slot
        wide = hidden.new_empty(2 * hidden.size(0), *hidden.shape[1:])
        wide[: hidden.size(0)].copy_(hidden)
        carrier, slot.hidden_tbh = slot.hidden_tbh, None
        wide[hidden.size(0) :] = 0 if carrier is None else carrier
        return wide

    @staticmethod
    def backward(ctx, d_wide):
        d_hidden, ctx.slot.normed_tbh = d_wide.chunk(2)
        return d_hidden, None


def halves_of_message(settings: Settings, depths: Iterable[int], forward_only: bool = False) -> int:
    """Return 2 where messages between stages hold a carrier beside the hidden state, else 1.

    Args:
        settings: The run.
        depths: The exits that train at this step.
        forward_only: Whether the schedule runs without backward.
    """
    staged = settings.pipeline_model_parallel_size > 1 and not forward_only
    return 2 if staged and taught_exits(settings, depths) else 1


def narrow(wide_tbh: torch.Tensor, slot: TeacherSlot) -> torch.Tensor:
    """Return the hidden state [t, b, h] of a message [2t, b, h], and put the carrier into ``slot``.

    In backward the teacher in ``slot`` becomes the gradient of the carrier.
    """
    return _Narrow.apply(wide_tbh, slot)


def widen(hidden_tbh: torch.Tensor, slot: TeacherSlot) -> torch.Tensor:
    """Return a message [2t, b, h] of a hidden state [t, b, h] and a carrier.

    The carrier is ``slot.hidden_tbh``, or zeros. In backward ``slot`` receives the teacher.
    """
    return _Widen.apply(hidden_tbh, slot)


def teach(backward: ExitBackward | None, norm: torch.nn.Module, slot: TeacherSlot) -> ExitBackward:
    """Return a backward of the last exit that first puts the teacher into ``slot``.

    Args:
        backward: The last exit's own backward; None where it does not train.
        norm: The last exit's norm.
        slot: The micro-batch's slot.
    """

    def teach_and_compute(hidden_tbh: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            slot.normed_tbh = norm(hidden_tbh)
        return torch.zeros_like(hidden_tbh) if backward is None else backward(hidden_tbh, factor)

    return teach_and_compute
