"""The loss on a teacher's choice against F.cross_entropy and autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from megatron_sorted.loss.cross_entropy import CrossEntropy, VocabularyShard
from megatron_sorted.loss.distillation import Distillation, TaughtCrossEntropy
from megatron_sorted.loss.linear_cross_entropy import exit_loss
from megatron_sorted.loss.taught_choice import ChoiceCrossEntropy
from tests.support.loss_case import EPSILON, make_case
from tests.unit.test_loss_distillation import FACTOR, make_teacher
from tests.unit.test_loss_memory import Allocations


def run(case, teacher, weight, chunk_tokens=4, with_choice=False):
    """Return losses and gradient to the hidden state."""
    request = case.request(chunk_tokens, with_choice=with_choice)
    token_loss = ChoiceCrossEntropy(request, weight, *teacher)
    return exit_loss(case.hidden_tbh, case.norm, case.weight_ph, token_loss, torch.tensor(FACTOR))


def expected(case, teacher, weight):
    """Return the two cross entropies, whether the choices agree, and gradients, in float64.

    The gradients are those to hidden state, norm and output matrix.
    """
    leaves = hidden, norm, matrix = [
        x.detach().double().requires_grad_()
        for x in (case.hidden_tbh, case.norm.weight, case.weight_ph)
    ]
    normed = F.rms_norm(hidden, hidden.shape[-1:], norm, EPSILON).flatten(0, 1)
    logits = normed @ matrix[: case.shard.size].t()
    taught = teacher[0].double().flatten(0, 1) @ teacher[1].detach().double()[: case.shard.size].t()
    if case.targets.index_n is not None:
        logits, taught = logits[case.targets.index_n], taught[case.targets.index_n]
    choice = taught.argmax(1)
    on_label, on_choice = (
        F.cross_entropy(logits, target, reduction="none")
        for target in (case.targets.labels_n, choice)
    )
    loss = (1 - weight) * on_label + weight * on_choice
    total = FACTOR * (loss * case.targets.loss_mask_n.double()).sum()
    agree = logits.argmax(1) == choice
    return on_label.detach(), on_choice.detach(), agree, torch.autograd.grad(total, leaves)


def close(actual, exact, tolerance=1e-6):
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


def assert_equal(case, teacher, weight, **options):
    losses, d_hidden = run(case, teacher, weight, **options)
    on_label, on_choice, agree, (e_hidden, e_norm, e_weight) = expected(case, teacher, weight)
    close(losses.loss_n, on_label)
    close(losses.kl_n, on_choice)
    assert losses.agree_n.tolist() == agree.tolist()
    close(d_hidden, e_hidden)
    close(case.norm.weight.grad, e_norm)
    close(case.weight_ph.grad, e_weight)
    assert teacher[1].grad is None, "the teacher must not learn from its pupils"


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_equals_cross_entropy_and_autograd(weight, chunk_tokens):
    case = make_case()
    assert_equal(case, make_teacher(case), weight, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_counted_tokens_masks_and_padding(weight):
    case = make_case(rows=24, vocabulary=19, index=[0, 2, 3, 7, 11, 14, 13], weighted=True)
    case.weight_ph.data[19:] *= 100.0  # would win every softmax
    teacher = make_teacher(case)
    teacher[1].data[19:] *= 100.0
    assert_equal(case, teacher, weight)
    assert case.weight_ph.grad[19:].abs().max() == 0


def test_equals_a_distribution_cut_to_one_token():
    case, same = make_case(weighted=True), make_case(weighted=True)
    losses, d_hidden = run(case, make_teacher(case), 0.3)
    rule = Distillation(0.3, 1.0, 1)
    cut = TaughtCrossEntropy(same.request(4), rule, *make_teacher(same))
    cut_losses, d_cut = exit_loss(
        same.hidden_tbh, same.norm, same.weight_ph, cut, torch.tensor(FACTOR)
    )
    torch.testing.assert_close(losses.kl_n, cut_losses.kl_n, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_hidden, d_cut, rtol=1e-5, atol=1e-6)


def test_the_label_may_be_the_choice():
    case = make_case()
    hidden, matrix = make_teacher(case)
    case.targets.labels_n[:] = (hidden.flatten(0, 1) @ matrix.detach().t()).argmax(1)
    assert_equal(case, (hidden, matrix), 0.3)


def test_of_equally_likely_tokens_the_lowest_is_learned():
    case = make_case()
    teacher = make_teacher(case)
    teacher[1].data[:] = teacher[1].data[:1]
    losses, _ = run(case, teacher, 1.0)
    logits = case.norm(case.hidden_tbh).flatten(0, 1) @ case.weight_ph.t()
    first = torch.zeros_like(case.targets.labels_n)
    close(losses.kl_n, F.cross_entropy(logits, first, reduction="none").detach().double())
    assert losses.agree_n.tolist() == (logits.argmax(1) == 0).tolist()


def test_a_teacher_that_is_the_exit_always_agrees():
    case = make_case()
    matrix = torch.nn.Parameter(case.weight_ph.detach().clone())
    losses, _ = run(case, (case.norm(case.hidden_tbh).detach(), matrix), 1.0)
    assert losses.agree_n.all()


def test_no_token_counts():
    case = make_case(index=[])
    losses, d_hidden = run(case, make_teacher(case), 0.5)
    assert losses.agree_n.shape == losses.kl_n.shape == (0,) and d_hidden.abs().max() == 0


def test_a_shard_of_padding_only():
    case = make_case()
    case.shard = VocabularyShard(24, 0)
    losses, d_hidden = run(case, make_teacher(case), 0.5)
    assert losses.loss_n.shape == (15,) and d_hidden.abs().max() == 0


def test_large_logits_do_not_overflow():
    case = make_case()
    case.weight_ph.data *= 300
    teacher = make_teacher(case)
    losses, d_hidden = run(case, teacher, 0.5)
    _, on_choice, _, (e_hidden, *_) = expected(case, teacher, 0.5)
    torch.testing.assert_close(losses.kl_n.double(), on_choice, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(d_hidden.double(), e_hidden, rtol=1e-3, atol=1e-1)


def test_bf16_is_as_good_as_bf16_can_be():
    case = make_case(t=16, b=4, h=32, rows=100, dtype=torch.bfloat16)
    case.weight_ph.data *= 0.2
    case.weight_ph.main_grad = torch.zeros(100, 32)
    teacher = make_teacher(case)
    losses, d_hidden = run(case, teacher, 0.6, 16)
    on_label, on_choice, _, (e_hidden, _, e_weight) = expected(case, teacher, 0.6)
    for actual, exact in (
        (losses.loss_n, on_label),
        (losses.kl_n, on_choice),
        (d_hidden, e_hidden),
        (case.weight_ph.main_grad, e_weight),
    ):
        assert (actual.double() - exact).norm() / exact.norm() < 0.015


def test_own_choice_on_request_and_nothing_else_changes():
    case, same = make_case(), make_case()
    losses, d_hidden = run(case, make_teacher(case), 0.5, with_choice=True)
    plain, d_plain = run(same, make_teacher(same), 0.5)
    logits = case.norm(case.hidden_tbh).flatten(0, 1) @ case.weight_ph.t()
    assert losses.choice_n.tolist() == logits.argmax(1).tolist() and plain.choice_n is None
    assert torch.equal(losses.kl_n, plain.kl_n) and torch.equal(d_hidden, d_plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_bytes_of_logits_as_plain_cross_entropy(dtype):
    def bytes_of_logits(make_loss) -> int:
        case = make_case(t=64, b=2, h=64, rows=1000, dtype=dtype)
        parameters = case.weight_ph, case.norm.weight
        for parameter in parameters:
            parameter.main_grad = torch.zeros(parameter.shape)
        teacher = make_teacher(case)
        loss = make_loss(case.request(16), teacher)
        with Allocations([case.weight_ph, case.weight_ph.main_grad, *teacher]) as seen:
            exit_loss(case.hidden_tbh, case.norm, case.weight_ph, loss, torch.tensor(FACTOR))
        return sum(size for size in seen.sizes if size >= 16 * 1000 * dtype.itemsize)

    plain = bytes_of_logits(lambda request, teacher: CrossEntropy(request))
    taught = bytes_of_logits(lambda request, teacher: ChoiceCrossEntropy(request, 0.7, *teacher))
    assert 0 < taught <= plain
