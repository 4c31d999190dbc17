"""Exits attached to a stage's output run in its backward, deepest first.

Each uses its own hidden state; the stage below receives a gradient of zero.
"""

import gc
import weakref

import pytest
import torch

from megatron_sorted.loss.attached import AttachedExit, attach_exits


def test_exits_run_in_backward_and_the_anchor_receives_zero():
    calls, received = [], torch.randn(3, 2, 4, requires_grad=True)
    hidden = received.detach()
    states = {depth: hidden * depth for depth in (1, 2, 3)}
    exits = [
        AttachedExit(
            states[depth],
            lambda h, f, depth=depth: calls.append((depth, h, f)),
            torch.tensor(0.5 * depth),
            (),
        )
        for depth in (1, 2)
    ] + [AttachedExit(states[3], None, torch.tensor(1.0), ())]
    output = attach_exits(hidden, received, exits)
    assert (
        output.requires_grad and output._base is None and torch.equal(output, hidden) and not calls
    )
    output.backward(torch.ones(3, 2, 4))
    assert [depth for depth, _, _ in calls] == [2, 1]
    for depth, h, factor in calls:
        assert torch.equal(h, states[depth]) and factor.item() == 0.5 * depth
    assert torch.equal(received.grad, torch.zeros(3, 2, 4))


def test_a_schedule_may_divide_the_scalar_a_network_ends_in():
    factors = []
    one = AttachedExit(
        torch.ones(2, 1, 4), lambda h, f: factors.append(f.item()), torch.tensor(0.25), ()
    )
    scalar = attach_exits(torch.zeros(()), None, [one])
    scalar *= 2
    scalar /= 3
    scalar.backward()
    assert factors == [0.25], "the factor is complete; the schedule's is not multiplied again"


def test_a_stage_whose_layers_train_keeps_its_own_gradient():
    received, weight = torch.randn(3, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    attach_exits(received.detach() * weight, received, []).backward(torch.ones(3, 4))
    assert torch.allclose(weight.grad, received.detach().sum(0)) and not received.grad.any()


def test_announced_parameters_are_marked_complete():
    parameter, announced = torch.nn.Parameter(torch.ones(3)), []
    parameter.register_post_accumulate_grad_hook(
        lambda p: announced.append(p.grad_added_to_main_grad)
    )
    attach_exits(
        torch.zeros(()),
        None,
        [AttachedExit(torch.ones(2, 1, 4), None, torch.tensor(1.0), (parameter,))],
    ).backward()
    assert announced == [True]


@pytest.mark.parametrize("backward_runs", [True, False])
def test_hidden_states_go_with_the_output(backward_runs):
    hidden = torch.ones(2, 1, 4)
    reference = weakref.ref(hidden)
    gc.disable()
    try:
        output = attach_exits(
            torch.zeros(()), None, [AttachedExit(hidden, lambda h, f: None, torch.tensor(1.0), ())]
        )
        del hidden
        assert reference() is not None or not backward_runs
        if backward_runs:
            output.backward()
        del output
        assert reference() is None
    finally:
        gc.enable()
