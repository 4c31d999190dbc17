"""Gradients are added where they belong, in place."""

import pytest
import torch

from megatron_sorted.loss.gradient import GradientSink
from megatron_sorted.loss.linear_cross_entropy import exit_loss
from tests.support.loss_case import make_case


def run(case, factor=1.0):
    return exit_loss(case.hidden_tbh, case.norm, case.weight_ph, case.loss(4), torch.tensor(factor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_is_added_to_in_place(dtype):
    case, once = make_case(dtype=dtype), make_case(dtype=dtype)
    for parameter in (case.weight_ph, case.norm.weight, once.weight_ph, once.norm.weight):
        parameter.main_grad = torch.zeros(parameter.shape)
    weight_place, norm_place = (
        case.weight_ph.main_grad.data_ptr(),
        case.norm.weight.main_grad.data_ptr(),
    )
    case.weight_ph.main_grad += 1.0
    run(once)
    run(case)
    run(case)
    assert case.weight_ph.grad is None and case.norm.weight.grad is None
    assert (case.weight_ph.main_grad.data_ptr(), case.norm.weight.main_grad.data_ptr()) == (
        weight_place,
        norm_place,
    )
    assert (
        case.weight_ph.main_grad.dtype == torch.float32
        and once.weight_ph.main_grad.abs().max() > 0.1
    )
    torch.testing.assert_close(case.weight_ph.main_grad, 1 + 2 * once.weight_ph.main_grad)
    torch.testing.assert_close(case.norm.weight.main_grad, 2 * once.norm.weight.main_grad)


@pytest.mark.parametrize("frozen", ["weight", "norm", "both"])
def test_frozen_parameters_get_nothing_and_change_nothing_else(frozen):
    case, free = make_case(), make_case()
    case.weight_ph.requires_grad_(frozen == "norm")
    case.norm.weight.requires_grad_(frozen == "weight")
    d_free, d_hidden = run(free)[1], run(case)[1]
    assert torch.equal(d_hidden, d_free)
    for parameter, other in (
        (case.weight_ph, free.weight_ph),
        (case.norm.weight, free.norm.weight),
    ):
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, other.grad)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_by_hand(dtype):
    # left.T @ right = [[1 2] [3 4]].T @ [[10] [100]] = [[310] [420]];
    # the third row has no column in left
    parameter = torch.nn.Parameter(torch.zeros(3, 1, dtype=dtype))
    parameter.main_grad = torch.tensor([[1.0], [2.0], [3.0]])
    left, right = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype),
        torch.tensor([[10.0], [100.0]], dtype=dtype),
    )
    GradientSink(parameter).add_product(left, right)
    assert parameter.main_grad.tolist() == [
        [311.0],
        [422.0],
        [3.0],
    ]  # 310 and 420 are exact in bfloat16 too


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_half_precision_blocks_cover_every_row(rows):
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(
        -3, 4, (3, rows), generator=generator
    ).bfloat16()  # small whole numbers: exact in bfloat16
    right = torch.randint(
        -3, 4, (3, 16), generator=generator
    ).bfloat16()  # wider than left: blocks of 1 to 12 rows
    parameter = torch.nn.Parameter(torch.zeros(rows, 16, dtype=torch.bfloat16))
    parameter.main_grad = torch.zeros(rows, 16)
    GradientSink(parameter).add_product(left, right)
    assert torch.equal(parameter.main_grad, left.float().t() @ right.float())
