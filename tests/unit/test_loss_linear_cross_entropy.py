"""The one-pass loss against F.cross_entropy and autograd."""

import math

import pytest
import torch

from megatron_sorted.loss.cross_entropy import Targets, VocabularyShard
from megatron_sorted.loss.linear_cross_entropy import exit_loss
from tests.support.loss_case import make_case, reference

FACTOR = 0.37


def run(case, chunk_tokens=4, factor=FACTOR):
    """Return losses and gradient to the hidden state."""
    factor = None if factor is None else torch.tensor(factor)
    return exit_loss(case.hidden_tbh, case.norm, case.weight_ph, case.loss(chunk_tokens), factor)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_equal_to_reference(case, losses, d_hidden, dtype=torch.float64, tolerance=2e-6):
    expected = reference(case, FACTOR, dtype)
    assert losses.loss_n.dtype == torch.float32
    close(losses.loss_n, expected.loss_n, 4 * tolerance)
    assert torch.equal(losses.correct_n, expected.correct_n)
    close(d_hidden, expected.d_hidden, tolerance)
    close(case.norm.weight.grad, expected.d_norm, 4 * tolerance)  # a sum over all tokens
    close(case.weight_ph.grad, expected.d_weight, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "chunk_tokens", [1, 4, 5, 15, 100]
)  # of 15 tokens: some divide, one is larger
def test_equals_cross_entropy_and_autograd(chunk_tokens, dtype):
    case = make_case()
    assert_equal_to_reference(case, *run(case, chunk_tokens), dtype)


def test_some_tokens_are_right_and_some_wrong():
    case = make_case()
    # labels by construction: the most likely token for even places, the least likely for odd ones
    logits = case.norm(case.hidden_tbh).flatten(0, 1) @ case.weight_ph.t()
    even = torch.arange(15) % 2 == 0
    case.targets = Targets(
        None, torch.where(even, logits.argmax(1), logits.argmin(1)), torch.ones(15)
    )
    losses, d_hidden = run(case)
    assert torch.equal(losses.correct_n, even)
    assert_equal_to_reference(case, losses, d_hidden)


def test_by_hand():
    # hidden (1, 1) has root mean square 1; logits are log 1, log 2, log 5; the label is the second:
    # probability 2 / 8
    case = make_case(t=1, b=1, h=2, rows=3)
    case.hidden_tbh = torch.ones(1, 1, 2)
    case.norm = torch.nn.RMSNorm(2, eps=0.0)
    logs = [[0.0, 0.0], [math.log(2), 0.0], [0.0, math.log(5)]]
    case.weight_ph = torch.nn.Parameter(torch.tensor(logs))
    case.targets = Targets(None, torch.tensor([1]), torch.ones(1))
    losses, _ = run(case, factor=1.0)
    close(losses.loss_n, torch.tensor([math.log(4)]), 1e-6)
    assert losses.correct_n.tolist() == [False]
    close(
        case.weight_ph.grad, torch.tensor([[1 / 8, 1 / 8], [-3 / 4, -3 / 4], [5 / 8, 5 / 8]]), 1e-6
    )


def test_only_indexed_tokens_count():
    case = make_case(index=[0, 2, 3, 7, 11, 14, 13])
    losses, d_hidden = run(case)
    assert losses.loss_n.shape == (7,)
    assert_equal_to_reference(case, losses, d_hidden)
    assert d_hidden.flatten(0, 1)[[1, 4, 5, 6]].abs().max() == 0


def test_mask_weighs_gradients_not_losses():
    case = make_case(weighted=True)
    losses, d_hidden = run(case)
    assert_equal_to_reference(case, losses, d_hidden)
    close(losses.loss_n, run(make_case())[0].loss_n, 0.0)


def test_no_token_counts():
    case = make_case(index=[])
    losses, d_hidden = run(case)
    assert losses.loss_n.shape == losses.correct_n.shape == (0,)
    assert d_hidden.shape == case.hidden_tbh.shape and d_hidden.abs().max() == 0
    assert case.norm.weight.grad is None or case.norm.weight.grad.abs().max() == 0
    assert case.weight_ph.grad is None or case.weight_ph.grad.abs().max() == 0


def test_padding_rows_take_no_part():
    case = make_case(rows=24, vocabulary=19)
    case.weight_ph.data[19:] = 100.0 * case.weight_ph.data[:5]  # would win every softmax
    losses, d_hidden = run(case)
    assert_equal_to_reference(case, losses, d_hidden)
    assert case.weight_ph.grad[19:].abs().max() == 0


def test_evaluation_gives_losses_only():
    case = make_case()
    losses, gradient = run(case, factor=None)
    assert gradient is None and case.weight_ph.grad is None and case.norm.weight.grad is None
    trained = run(case)[0]
    assert torch.equal(losses.loss_n, trained.loss_n) and torch.equal(
        losses.correct_n, trained.correct_n
    )


def test_large_logits_do_not_overflow():
    case = make_case()
    case.weight_ph.data *= (
        300  # logits of some thousands: exp would be infinite without the maximum
    )
    losses, d_hidden = run(case)
    assert losses.loss_n.max() > 1000
    expected = reference(case, FACTOR, torch.float64)
    torch.testing.assert_close(losses.loss_n.double(), expected.loss_n, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(d_hidden.double(), expected.d_hidden, rtol=1e-3, atol=1e-2)


def test_bf16_is_as_good_as_bf16_can_be():
    # bfloat16 keeps 8 bits. Logits of about 10 are rounded to 1/32 or so: losses and probabilities
    # change by a few per cent at most.
    case = make_case(t=16, b=4, h=32, rows=100, dtype=torch.bfloat16)
    case.weight_ph.data *= 0.2
    case.weight_ph.main_grad = torch.zeros(100, 32)
    losses, d_hidden = run(case, chunk_tokens=16)
    expected = reference(case, FACTOR, torch.float64)
    assert d_hidden.dtype == torch.bfloat16 and losses.loss_n.dtype == torch.float32
    for actual, exact in (
        (losses.loss_n, expected.loss_n),
        (d_hidden, expected.d_hidden),
        (case.weight_ph.main_grad, expected.d_weight),
    ):
        error = (actual.double() - exact).norm() / exact.norm()
        assert error < 0.01
    # the rounding is ours alone where bf16 autograd is no better
    plain = reference(case, FACTOR, torch.bfloat16)
    ours = (case.weight_ph.main_grad - expected.d_weight).norm()
    assert ours < 1.1 * (plain.d_weight.double() - expected.d_weight).norm()


def test_shard_without_a_label_sees_only_its_part():
    # A shard alone in its group whose ids start at 100: labels 100..123 are its rows 0..23.
    case, moved = make_case(), make_case()
    moved.shard = VocabularyShard(100, 24)
    moved.targets = Targets(None, case.targets.labels_n + 100, case.targets.loss_mask_n)
    here, there = run(case), run(moved)
    assert torch.equal(here[0].loss_n, there[0].loss_n) and torch.equal(here[1], there[1])
    assert torch.equal(case.weight_ph.grad, moved.weight_ph.grad)


def test_most_likely_token_on_request_and_nothing_else_changes():
    case, same = make_case(), make_case()
    plain, d_plain = run(same)
    losses, d_hidden = exit_loss(
        case.hidden_tbh,
        case.norm,
        case.weight_ph,
        case.loss(4, with_choice=True),
        torch.tensor(FACTOR),
    )
    logits = case.norm(case.hidden_tbh).flatten(0, 1) @ case.weight_ph.t()
    assert (
        losses.choice_n.dtype == torch.int32
        and losses.choice_n.tolist() == logits.argmax(1).tolist()
    )
    assert (
        plain.choice_n is None
        and torch.equal(plain.loss_n, losses.loss_n)
        and torch.equal(d_plain, d_hidden)
    )
    assert torch.equal(case.weight_ph.grad, same.weight_ph.grad)


def test_of_equally_likely_tokens_the_lowest_id_is_chosen():
    case = make_case(dtype=torch.bfloat16)
    case.weight_ph.data[9:] = case.weight_ph.data[9]  # rows 9.. are all alike
    case.weight_ph.data[:9] = 0
    losses, _ = exit_loss(
        case.hidden_tbh, case.norm, case.weight_ph, case.loss(4, with_choice=True)
    )
    assert set(losses.choice_n.tolist()) <= {0, 9} and len(set(losses.choice_n.tolist())) == 2
