"""The teacher is sent as the gradient of the carrier, whatever the stages between do."""

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

from megatron_sorted.training.step.carrier import (
    TeacherSlot,
    halves_of_message,
    narrow,
    teach,
    widen,
)
from tests.support.tiny import tiny


@pytest.mark.parametrize("freed", [False, True])
def test_a_teacher_passes_two_stages_bit_for_bit(freed):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 4) for _ in range(3)]
    norm = torch.nn.RMSNorm(4)
    slots = [TeacherSlot() for _ in layers]
    seen = {}

    # three stages: each receives a leaf, as from Megatron's schedule, and sends on its gradient
    messages = []
    hidden = torch.randn(3, 2, 4)
    first = hidden
    for number in range(2):
        output = widen(torch.tanh(layers[number](hidden)), slots[number])
        assert output.shape == (6, 2, 4) and output._base is None and output[3:].eq(0).all()
        message = output.detach().clone().requires_grad_()
        messages.append((output, message))
        hidden = narrow(message, slots[number + 1])
        assert torch.equal(hidden, output[:3])
        hidden.register_hook(
            lambda d, number=number: seen.update({number: slots[number + 1].normed_tbh})
        )
    last = torch.tanh(layers[2](hidden))
    exit_backward = teach(lambda h, factor: factor * h, norm, slots[2])
    last.backward(exit_backward(last.detach(), torch.tensor(0.5)))
    teacher = norm(last).detach()
    for output, message in reversed(messages):
        if freed:  # as Megatron's schedules do on GPUs, to save the memory of what was sent
            deallocate_output_tensor(output, True)
            custom_backward(output, message.grad)
        else:
            output.backward(message.grad)
    assert torch.equal(seen[1], teacher) and torch.equal(slots[0].normed_tbh, teacher)
    assert slots[1].normed_tbh is None and slots[2].normed_tbh is None, (
        "a slot is empty once the teacher has been sent on"
    )
    # the gradients are those of the same layers without messages
    gradients = [layer.weight.grad.clone() for layer in layers]
    for layer in layers:
        layer.zero_grad()
    plain = first
    for layer in layers:
        plain = torch.tanh(layer(plain))
    plain.backward(0.5 * plain.detach())
    for layer, gradient in zip(layers, gradients, strict=True):
        torch.testing.assert_close(layer.weight.grad, gradient)


def test_a_teacher_that_does_not_train_sends_no_gradient():
    slot = TeacherSlot()
    hidden = torch.randn(3, 2, 4)
    assert teach(None, torch.nn.RMSNorm(4), slot)(hidden, torch.tensor(1.0)).eq(0).all()
    assert slot.normed_tbh is not None and not slot.normed_tbh.requires_grad


@pytest.mark.parametrize(
    ("changes", "depths", "forward_only", "halves"),
    [
        ({"exit_kd_weight": 0.5, "pipeline_model_parallel_size": 2}, (1, 4), False, 2),
        ({"exit_kd_weight": 0.5, "pipeline_model_parallel_size": 2}, (1,), False, 2),
        # no exit is taught at this step
        ({"exit_kd_weight": 0.5, "pipeline_model_parallel_size": 2}, (4,), False, 1),
        ({"exit_kd_weight": 0.5, "pipeline_model_parallel_size": 2}, (1, 4), True, 1),
        ({"exit_kd_weight": 0.5}, (1, 4), False, 1),
        ({"pipeline_model_parallel_size": 2}, (1, 4), False, 1),
    ],
)
def test_messages_are_wide_only_where_they_carry_a_teacher(changes, depths, forward_only, halves):
    assert halves_of_message(tiny(**changes), depths, forward_only) == halves
