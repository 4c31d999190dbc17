"""Sums over micro-batches and steps."""

import pytest
import torch

from megatron_sorted.loss.ledger import COLUMNS, Ledger, square_sum
from megatron_sorted.loss.linear_cross_entropy import ExitLoss

CPU = torch.device("cpu")


def one_token(loss: float, correct: bool = False) -> tuple[ExitLoss, torch.Tensor]:
    """Return what ``add`` takes, of a micro-batch of one token."""
    return ExitLoss(torch.tensor([loss]), torch.tensor([correct])), torch.ones(1)


def test_sums_by_hand():
    ledger = Ledger()
    ledger.add(
        2,
        ExitLoss(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True])),
        torch.tensor([1.0, 1.0, 0.5]),
    )
    ledger.add(2, *one_token(3.0))
    ledger.add(4, ExitLoss(torch.empty(0), torch.empty(0, dtype=torch.bool)), torch.empty(0))
    # loss 1 + 2 + 2 + 3; correct 1 + 0.5; tokens 2.5 + 1; means 5 / 2.5 + 3; two micro-batches;
    # no pieces, gradients or steps given
    assert (
        ledger.sums[2].tolist() == [8.0, 1.5, 3.5, 5.0, 2.0, 2.0, *[0.0] * 11]
        and ledger.sums[2].dtype == torch.float64
    )
    # a micro-batch without a trained token was called, but is in no mean
    assert ledger.sums[4].tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, *[0.0] * 11]
    assert len(COLUMNS) == 17
    ledger.clear()
    assert ledger == Ledger()


def test_a_part_of_a_micro_batch_uses_the_mean_of_the_whole():
    ledger = Ledger()
    ledger.add(1, *one_token(3.0), whole=(torch.tensor(10.0), torch.tensor(4.0)))
    ledger.add(
        1,
        ExitLoss(torch.empty(0), torch.empty(0, dtype=torch.bool)),
        torch.empty(0),
        whole=(torch.tensor(10.0), torch.tensor(4.0)),
    )
    sums = dict(zip(COLUMNS, ledger.sums[1].tolist(), strict=True))
    assert (sums["loss"], sums["tokens"], sums["mean_loss"], sums["micro_batches"]) == (
        3.0,
        1.0,
        5.0,
        2.0,
    )


def test_pieces_with_every_label_right():
    ledger = Ledger()
    correct = torch.tensor([True, True, False, True, True])
    # pieces 0 (two tokens, both right), 2 (one of two right), 3 (its one token right);
    # piece 1 has no counted token
    ledger.add(
        1,
        ExitLoss(torch.ones(5), correct),
        torch.ones(5),
        piece_n=torch.tensor([0, 0, 2, 2, 3]),
        num_pieces=9,
    )
    sums = dict(zip(COLUMNS, ledger.sums[1].tolist(), strict=True))
    assert sums["pieces"] == 3 and sums["exact_pieces"] == 2 and sums["correct"] == 4


def step(gradients: list[list[float]], divisor: float, depth: int = 3) -> Ledger:
    """Return the ledger of a finished step with one micro-batch a gradient."""
    ledger = Ledger()
    for gradient in gradients:
        ledger.add(depth, *one_token(1.0))
        ledger.add_gradient(depth, torch.tensor(gradient))
    ledger.finish_step(torch.tensor(divisor))
    return ledger


def test_gradients_of_a_step_are_divided_at_its_end():
    first, second = step([[3.0, 4.0], [2.0, 0.0]], 2.0), step([[6.0]], 3.0)
    # (9 + 16 + 4) / 4 of the first step, 36 / 9 of the second
    sums = dict(zip(COLUMNS, first.sums[3].tolist(), strict=True))
    assert (
        sums["gradient_square"] == pytest.approx(7.25)
        and sums["steps"] == 1
        and sums["micro_batches"] == 2
    )
    first.merge(second)
    sums = dict(zip(COLUMNS, first.sums[3].tolist(), strict=True))
    assert (
        sums["gradient_square"] == pytest.approx(11.25)
        and sums["steps"] == 2
        and sums["micro_batches"] == 3
    )
    # an exit that a step does not train has no step
    first.finish_step(torch.tensor(5.0))
    assert first.sums[3][COLUMNS.index("steps")] == 2


def test_a_merged_ledger_can_be_added_to_again():
    interval, one = Ledger(), step([[1.0]], 1.0)
    one.add_drafts(3, torch.tensor([[4, 2], [3, 1]]))
    interval.merge(one)
    one.add(3, *one_token(5.0))
    one.add_gradient(3, torch.tensor([7.0]))
    one.finish_step(torch.tensor(1.0))
    one.add_drafts(3, torch.tensor([[4, 2], [3, 1]]))
    assert interval.sums[3].tolist() == [
        1.0,
        0.0,
        1.0,
        1.0,
        1.0,
        1.0,
        0.0,
        0.0,
        1.0,
        1.0,
        *[0.0] * 7,
    ]
    assert interval.drafts[3].tolist() == [[4, 2], [3, 1]]
    interval.merge(one)
    assert interval.drafts[3].tolist() == [[12, 6], [9, 3]]


def test_teacher_and_gradient_pairs():
    ledger = Ledger()
    mask = torch.tensor([1.0, 0.5])
    for kl in ([0.2, 0.4], [0.6, 0.0]):
        ledger.add(
            1, ExitLoss(torch.ones(2), torch.ones(2, dtype=torch.bool), kl_n=torch.tensor(kl)), mask
        )
    ledger.add(2, ExitLoss(torch.ones(2), torch.ones(2, dtype=torch.bool)), mask)
    ledger.add_gradient_pair(1, torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -2.0]]))
    ledger.add_gradient_pair(1, torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 2.0]]))
    open_still = Ledger()
    open_still.merge(ledger)
    for one in (ledger, open_still):
        one.finish_step(torch.tensor(2.0))
        sums = dict(zip(COLUMNS, one.sums[1].tolist(), strict=True))
        assert (
            sums["kl"] == pytest.approx(1.0)
            and sums["mean_kl"] == pytest.approx(1.0 / 1.5)
            and sums["taught_batches"] == 2
        )
        # product 3 - 8 + 4, squares 25 + 4 and 5 + 8, all over 2^2
        assert [sums["met_product"], sums["met_own"], sums["met_deeper"]] == pytest.approx(
            [-0.25, 7.25, 3.25]
        )
        assert dict(zip(COLUMNS, one.sums[2].tolist(), strict=True))["taught_batches"] == 0
    ledger.drop_gradients()
    assert ledger.sums[1][-3:].tolist() == [0.0] * 3 and ledger.sums[1][COLUMNS.index("kl")] > 0.9
    ledger.add_gradient_pair(1, torch.ones(1, 1), torch.ones(1, 1))
    ledger.clear()
    assert ledger == Ledger()


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), float("-inf")])
def test_bad_exits_are_named(worst):
    ledger = Ledger()
    assert ledger.bad_flag(CPU) == 0 and ledger.bad_exits() == {}
    for depth, loss, gradient in (
        (1, 1.0, 1.0),
        (2, worst, 1.0),
        (3, 1.0, worst),
        (5, worst, worst),
    ):
        for value, slope in ((1.0, 1.0), (loss, gradient), (2.0, 1.0)):
            ledger.add(depth, *one_token(value))
            ledger.add_gradient(depth, torch.tensor([slope]))
        if depth == 1:
            assert ledger.bad_flag(CPU) == 0 and ledger.bad_exits() == {}
    expected = {2: ["loss"], 3: ["gradient"], 5: ["loss", "gradient"]}
    assert (
        ledger.bad_exits() == expected
        and ledger.bad_flag(CPU) == 1
        and ledger.bad_flag(CPU).shape == ()
    )
    ledger.finish_step(torch.tensor(2.0))
    assert ledger.bad_exits() == expected and ledger.bad_flag(CPU) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_squares_are_summed_in_single_precision(dtype):
    # in fp16 the square of 1000 would be infinite and that of 1e-4 zero
    values = torch.tensor([1000.0, 1e-4] * 400000, dtype=dtype).view(40, 5, 4000)
    assert square_sum(values).item() == pytest.approx(
        values.double().square().sum().item(), rel=1e-5
    )
    assert square_sum(torch.full((3,), 6e4, dtype=dtype)).isfinite()


def test_agreement_with_the_teachers_choice_counts_trained_tokens():
    ledger = Ledger()
    taught = {"kl_n": torch.tensor([1.0, 2.0, 4.0]), "agree_n": torch.tensor([True, False, True])}
    losses = ExitLoss(torch.ones(3), torch.zeros(3, dtype=torch.bool), **taught)
    ledger.add(2, losses, torch.tensor([1.0, 1.0, 0.5]))
    ledger.add(2, losses, torch.tensor([0.0, 1.0, 1.0]))
    sums = dict(zip(COLUMNS, ledger.sums[2].tolist(), strict=True))
    assert (sums["agreed"], sums["taught_batches"]) == (2.5, 2.0)
    assert sums["kl"] == 5.0 + 6.0
