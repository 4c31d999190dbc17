"""The loss of a taught exit against F.cross_entropy, F.kl_div and autograd in float64.

And the memory that it takes.
"""

import pytest
import torch
import torch.nn.functional as F

from megatron_sorted.loss import distillation
from megatron_sorted.loss.cross_entropy import VocabularyShard
from megatron_sorted.loss.distillation import Distillation, TaughtCrossEntropy
from megatron_sorted.loss.linear_cross_entropy import exit_loss
from tests.support.loss_case import EPSILON, LossCase, make_case
from tests.support.taught import divergence
from tests.unit.test_loss_memory import Allocations

FACTOR = 0.37
RULES = [
    Distillation(1.0),
    Distillation(0.3),
    Distillation(0.6, 2.0),
    Distillation(1.0, 0.5),
    Distillation(0.6, 3.0, 5),
    Distillation(0.5, 1.0, 1),
]


def make_teacher(case: LossCase, seed: int = 3) -> tuple[torch.Tensor, torch.nn.Parameter]:
    """Return a teacher's normed hidden state and an output matrix of its own."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(case.weight_ph.shape, generator=generator).to(case.weight_ph.dtype)
    return torch.randn(case.hidden_tbh.shape, generator=generator).to(
        case.hidden_tbh.dtype
    ), torch.nn.Parameter(weight)


def run(case, teacher, rule, chunk_tokens=4, with_choice=False):
    """Return losses and gradient to the hidden state."""
    token_loss = TaughtCrossEntropy(
        case.request(chunk_tokens, with_choice=with_choice), rule, *teacher
    )
    return exit_loss(case.hidden_tbh, case.norm, case.weight_ph, token_loss, torch.tensor(FACTOR))


def expected(case, teacher, rule):
    """Return cross entropies, divergences and the gradients, in float64.

    The gradients are those to hidden state, norm and output matrix.
    """
    hidden, norm, weight = (
        x.detach().double().requires_grad_()
        for x in (case.hidden_tbh, case.norm.weight, case.weight_ph)
    )
    logits = (
        F.rms_norm(hidden, hidden.shape[-1:], norm, EPSILON).flatten(0, 1)
        @ weight[: case.shard.size].t()
    )
    taught = teacher[0].double().flatten(0, 1) @ teacher[1].detach().double()[: case.shard.size].t()
    if case.targets.index_n is not None:
        logits, taught = logits[case.targets.index_n], taught[case.targets.index_n]
    entropy = F.cross_entropy(logits, case.targets.labels_n, reduction="none")
    apart = divergence(logits, taught, rule.temperature, rule.top_k)
    loss = (1 - rule.weight) * entropy + rule.weight * rule.temperature**2 * apart
    return (
        entropy,
        apart,
        torch.autograd.grad(
            FACTOR * (loss * case.targets.loss_mask_n.double()).sum(), (hidden, norm, weight)
        ),
    )


def close(actual, exact, tolerance):
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


def assert_equal(case, teacher, rule, **options):
    losses, d_hidden = run(case, teacher, rule, **options)
    entropy, apart, (e_hidden, e_norm, e_weight) = expected(case, teacher, rule)
    close(losses.loss_n, entropy.detach(), 1e-5)
    close(losses.kl_n, apart.detach(), 1e-5)
    close(d_hidden, e_hidden, 4e-6)
    close(case.norm.weight.grad, e_norm, 1e-5)
    close(case.weight_ph.grad, e_weight, 4e-6)
    assert teacher[1].grad is None, "the teacher must not learn from its pupils"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_equals_kl_div_and_autograd(rule, chunk_tokens):
    case = make_case()
    assert_equal(case, make_teacher(case), rule, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("rule", RULES)
def test_counted_tokens_masks_padding_and_rows_in_blocks(rule, monkeypatch):
    monkeypatch.setattr(distillation, "ROW_BYTES", 3 * 4 * 19)
    case = make_case(rows=24, vocabulary=19, index=[0, 2, 3, 7, 11, 14, 13], weighted=True)
    case.weight_ph.data[19:] *= 100.0  # would win every softmax
    teacher = make_teacher(case)
    teacher[1].data[19:] *= 100.0
    assert_equal(case, teacher, rule)
    assert case.weight_ph.grad[19:].abs().max() == 0


def test_the_mean_over_tokens_is_not_torchs_batchmean():
    # two tokens in one sequence: batchmean divides by the number of sequences, so it would grow
    # with their length
    case = make_case(t=2, b=1)
    teacher = make_teacher(case)
    losses, _ = run(case, teacher, Distillation(1.0))
    logits = case.norm(case.hidden_tbh).detach() @ case.weight_ph.detach().t()
    student, target = (
        logits.transpose(0, 1).log_softmax(-1),
        (teacher[0] @ teacher[1].detach().t()).transpose(0, 1).softmax(-1),
    )
    batchmean = F.kl_div(student, target, reduction="batchmean")
    assert losses.kl_n.mean().item() == pytest.approx(batchmean.item() / 2, rel=1e-5)


def test_a_teacher_that_agrees_gives_no_gradient():
    case = make_case()
    teacher = (
        case.norm(case.hidden_tbh).detach(),
        torch.nn.Parameter(case.weight_ph.detach().clone()),
    )
    losses, d_hidden = run(case, teacher, Distillation(1.0, 2.0))
    assert losses.kl_n.abs().max() < 2e-6 and d_hidden.abs().max() < 2e-6


def test_tokens_as_likely_as_the_last_kept_one_are_kept_too():
    case = make_case()
    teacher = make_teacher(case)
    teacher[1].data[5:9] = 3 * teacher[1].data[5]  # four alike
    losses, _ = run(case, teacher, Distillation(1.0, 1.0, 2))
    logits = teacher[0].flatten(0, 1) @ teacher[1].detach().t()
    kept = logits >= logits.topk(2, dim=1).values[:, 1:]
    assert kept.sum(1).max() >= 4
    target = logits.masked_fill(~kept, float("-inf")).softmax(1)
    student = (case.norm(case.hidden_tbh).flatten(0, 1) @ case.weight_ph.t()).log_softmax(1)
    torch.testing.assert_close(
        losses.kl_n,
        F.kl_div(student, target, reduction="none").sum(1).detach(),
        rtol=1e-5,
        atol=1e-5,
    )


def test_no_token_counts():
    case = make_case(index=[])
    losses, d_hidden = run(case, make_teacher(case), Distillation(0.5, 2.0, 3))
    assert losses.loss_n.shape == (0,) and d_hidden.abs().max() == 0


def test_a_shard_of_padding_only():
    case = make_case()
    case.shard = VocabularyShard(24, 0)
    losses, d_hidden = run(case, make_teacher(case), Distillation(0.5, 2.0))
    assert losses.loss_n.shape == (15,) and d_hidden.abs().max() == 0


def test_large_logits_do_not_overflow():
    case = make_case()
    case.weight_ph.data *= 300
    teacher = make_teacher(case)
    teacher[1].data *= 300
    rule = Distillation(0.5, 2.0)
    losses, d_hidden = run(case, teacher, rule)
    _, apart, (e_hidden, *_) = expected(case, teacher, rule)
    torch.testing.assert_close(losses.kl_n.double(), apart.detach(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(d_hidden.double(), e_hidden, rtol=1e-3, atol=1e-1)


def test_bf16_is_as_good_as_bf16_can_be():
    case = make_case(t=16, b=4, h=32, rows=100, dtype=torch.bfloat16)
    case.weight_ph.data *= 0.2
    case.weight_ph.main_grad = torch.zeros(100, 32)
    teacher, rule = make_teacher(case), Distillation(0.6, 2.0)
    teacher[1].data *= 0.2
    losses, d_hidden = run(case, teacher, rule, 16)
    entropy, apart, (e_hidden, _, e_weight) = expected(case, teacher, rule)
    for actual, exact in (
        (losses.loss_n, entropy),
        (losses.kl_n, apart),
        (d_hidden, e_hidden),
        (case.weight_ph.main_grad, e_weight),
    ):
        assert (actual.double() - exact).norm() / exact.norm() < 0.015


def test_choice_on_request_and_nothing_else_changes():
    case, same = make_case(), make_case()
    rule = Distillation(0.5, 2.0)
    losses, d_hidden = run(case, make_teacher(case), rule, with_choice=True)
    plain, d_plain = run(same, make_teacher(same), rule)
    logits = case.norm(case.hidden_tbh).flatten(0, 1) @ case.weight_ph.t()
    assert losses.choice_n.tolist() == logits.argmax(1).tolist() and plain.choice_n is None
    assert torch.equal(losses.kl_n, plain.kl_n) and torch.equal(d_hidden, d_plain)


@pytest.mark.parametrize("rule", [Distillation(0.5), Distillation(0.5, 2.0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_tensor_is_a_chunk_of_logits(dtype, rule):
    case = make_case(t=64, b=2, h=64, rows=1000, dtype=dtype)
    case.weight_ph.main_grad, case.norm.weight.main_grad = torch.zeros(1000, 64), torch.zeros(64)
    teacher = make_teacher(case)
    with Allocations([case.weight_ph, case.weight_ph.main_grad, *teacher]) as seen:
        run(case, teacher, rule, 16)
    assert (
        max(seen.sizes) <= 16 * 1000 * 4
    )  # the head has 256,000 bytes in fp32, all logits 512,000
