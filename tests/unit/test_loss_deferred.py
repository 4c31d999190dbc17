"""Exits computed in backward have the gradients of exits computed in forward.

Forward keeps no more tensors than without exits.
"""

import pytest
import torch
import torch.nn.functional as F

from megatron_sorted.loss.deferred import end, tap
from megatron_sorted.loss.linear_cross_entropy import exit_loss
from tests.support.loss_case import EPSILON, make_case

COEFFICIENTS = {1: 0.3, 2: 0.25, 3: 0.45}
RULE_FACTOR = 0.125  # what the schedule multiplies the loss's gradient by


def make_network():
    """Return three layers, their input [5, 3, 8], and the head's case."""
    torch.manual_seed(11)
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
    return layers, torch.randn(5, 3, 8, requires_grad=True), make_case()


def gradients(layers, x, case):
    return [
        x.grad,
        *(p.grad for p in layers.parameters()),
        case.norm.weight.grad,
        case.weight_ph.grad,
    ]


def train_eagerly(depths):
    """Return all gradients by plain autograd."""
    layers, x, case = make_network()
    hidden, loss = x, 0.0
    for depth, layer in enumerate(layers, start=1):
        hidden = torch.tanh(layer(hidden))
        if depth in depths:
            logits = (
                F.rms_norm(hidden, (8,), case.norm.weight, EPSILON).flatten(0, 1)
                @ case.weight_ph.t()
            )
            loss = loss + COEFFICIENTS[depth] * F.cross_entropy(
                logits, case.targets.labels_n, reduction="sum"
            )
    (RULE_FACTOR * loss).backward()
    return gradients(layers, x, case)


def train_deferred(depths, kept=None):
    """Return all gradients with exits in backward; ``kept`` receives tensors saved in forward."""
    layers, x, case = make_network()

    def backward(hidden, factor):
        return exit_loss(hidden, case.norm, case.weight_ph, case.loss(4), factor)[1]

    def keep(tensor):
        kept.append(tensor)
        return tensor

    hidden = x
    for depth, layer in enumerate(layers, start=1):
        hidden = torch.tanh(layer(hidden))
        exit_backward = backward if depth in depths else None
        with torch.autograd.graph.saved_tensors_hooks(
            keep if kept is not None else lambda tensor: tensor, lambda tensor: tensor
        ):
            if depth < 3:
                before, hidden = (
                    hidden,
                    tap(hidden, exit_backward, torch.tensor(COEFFICIENTS[depth] * RULE_FACTOR)),
                )
                assert hidden._base is None  # the schedules cannot free a view
                assert torch.equal(hidden, before)
            else:
                before, scalar = hidden, end(hidden, exit_backward, COEFFICIENTS[3])
        if kept is not None:
            assert [tensor.data_ptr() for tensor in kept] == [before.data_ptr()]
            kept.clear()
    assert scalar.shape == () and scalar.item() == 0.0
    scalar.backward(torch.tensor(RULE_FACTOR))
    return gradients(layers, x, case)


@pytest.mark.parametrize("depths", [{1, 2, 3}, {1, 3}, {3}, {1, 2}])
def test_gradients_equal_those_of_eager_exits(depths):
    for ours, eager in zip(train_deferred(depths), train_eagerly(depths), strict=True):
        # plain autograd gives None to a layer above the deepest exit, a schedule that runs it 0
        torch.testing.assert_close(
            ours, torch.zeros_like(ours) if eager is None else eager, rtol=2e-6, atol=1e-6
        )


def test_forward_keeps_the_hidden_state_and_nothing_else():
    train_deferred({1, 2, 3}, kept=[])


@pytest.mark.parametrize("exit_kind", ["tap", "end"])
def test_announced_parameters_are_reported_ready_once(exit_kind):
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    parameter.main_grad = torch.full((4, 3), 5.0)
    fired = []
    parameter.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad_added_to_main_grad))
    hidden = torch.ones(2, 1, 3, requires_grad=True)
    if exit_kind == "tap":
        tap(hidden, None, None, (parameter,)).sum().backward()
    else:
        end(hidden, None, 1.0, (parameter,)).backward()
    assert fired == [True]
    assert parameter.grad.shape == (4, 3) and parameter.main_grad.eq(5.0).all()
    assert hidden.grad.eq(1.0 if exit_kind == "tap" else 0.0).all()
