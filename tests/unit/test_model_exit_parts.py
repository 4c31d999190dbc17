"""The parts of an exit that need no other process: adapter, and what reads an exit."""

from types import SimpleNamespace

import pytest
import torch

from megatron_sorted.loss.linear_cross_entropy import exit_loss
from megatron_sorted.model.exit_parts import ExitAdapter, NormWithParts, without_recomputation
from tests.support.loss_case import EPSILON, make_case


def make_adapter(sequence_parallel: bool = False) -> ExitAdapter:
    config = SimpleNamespace(
        hidden_size=8,
        params_dtype=torch.float32,
        init_method=torch.nn.init.normal_,
        sequence_parallel=sequence_parallel,
    )
    return ExitAdapter(config, 2)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr("megatron_sorted.model.exit_parts.current_device", lambda: "cpu")


def test_an_adapter_starts_as_the_identity_and_is_marked_for_sequence_parallelism():
    x = torch.randn(3, 2, 8)
    adapter = make_adapter(True)
    assert torch.equal(adapter(x), x) and adapter.down.weight.any()
    assert {name: tuple(p.shape) for name, p in adapter.named_parameters()} == {
        "down.weight": (2, 8),
        "up.weight": (8, 2),
    }
    assert all(p.sequence_parallel for p in adapter.parameters())
    assert not any(p.sequence_parallel for p in make_adapter().parameters())


@pytest.mark.parametrize("already_added", [False, True])
def test_an_exit_read_through_an_adapter_has_the_gradients_of_autograd(already_added):
    """Check the second micro-batch too, where parameters still have the first one's mark."""
    torch.manual_seed(1)
    case, adapter = make_case(), make_adapter()
    torch.nn.init.normal_(adapter.up.weight)
    reader = NormWithParts(adapter, None, case.norm, None, None, False)
    assert list(reader.parameters()) == [*adapter.parameters(), *case.norm.parameters()]
    hidden = torch.randn(5, 3, 8, requires_grad=True)
    for parameter in reader.parameters():
        parameter.grad_added_to_main_grad = already_added
    losses, d_hidden = exit_loss(hidden, reader, case.weight_ph, case.loss(4), torch.tensor(0.5))
    got = [p.grad.clone() for p in reader.parameters()]
    for parameter in (*reader.parameters(), case.weight_ph):
        parameter.grad = None
    read = torch.nn.functional.rms_norm(
        hidden + hidden @ adapter.down.weight.t() @ adapter.up.weight.t(),
        (8,),
        case.norm.weight,
        EPSILON,
    )
    logits = read.flatten(0, 1) @ case.weight_ph.t()
    expected = torch.nn.functional.cross_entropy(logits, case.targets.labels_n, reduction="none")
    assert torch.allclose(losses.loss_n, expected, atol=1e-6)
    (0.5 * expected * case.targets.loss_mask_n).sum().backward()
    assert torch.allclose(d_hidden, hidden.grad, atol=1e-6)
    for gradient, parameter in zip(got, reader.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-6)


class Fused(torch.autograd.Function):
    """A product whose weight's gradient a kernel adds to ``main_grad`` by itself.

    Apex's does so under Megatron.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, d):
        x, weight = ctx.saved_tensors
        ctx.saved_tensors[1].main_grad.add_((d * x).sum((0, 1)))
        weight.grad_added_to_main_grad = True
        return d * weight, torch.full_like(weight, 99.0)


def test_a_gradient_that_a_fused_kernel_has_added_is_not_added_again():
    case = make_case()
    weight = torch.nn.Parameter(torch.ones(8))
    weight.main_grad = torch.zeros(8)
    x = torch.randn(5, 3, 8)

    class Reader:
        def __call__(self, hidden):
            return Fused.apply(hidden, weight)

        def parameters(self):
            return iter((weight,))

    for step in (1, 2):
        _, d_hidden = exit_loss(x, Reader(), case.weight_ph, case.loss(4), torch.tensor(1.0))
        # hidden and weight are 1: the gradient to the weight is that to the hidden state times the
        # hidden state
        assert torch.allclose(weight.main_grad, step * (d_hidden * x).sum((0, 1)), atol=1e-5)


def test_exits_layers_are_not_computed_again():
    config = SimpleNamespace(
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        hidden_size=8,
    )
    plain = without_recomputation(config)
    assert (
        plain.recompute_granularity,
        plain.recompute_method,
        plain.recompute_num_layers,
        plain.hidden_size,
    ) == (None, None, None, 8)
    assert config.recompute_granularity == "full"
