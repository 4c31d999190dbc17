"""Sums over micro-batches."""

import torch

from megatron_sorted.loss.ledger import COLUMNS, Ledger
from megatron_sorted.loss.linear_cross_entropy import ExitLoss


def test_sums_by_hand():
    ledger = Ledger()
    ledger.add(2, ExitLoss(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True])), torch.tensor([1.0, 1.0, 0.5]))
    ledger.add(2, ExitLoss(torch.tensor([3.0]), torch.tensor([False])), torch.tensor([1.0]))
    ledger.add(4, ExitLoss(torch.empty(0), torch.empty(0, dtype=torch.bool)), torch.empty(0))
    # loss 1 + 2 + 2 + 3; correct 1 + 0.5; tokens 2.5 + 1; means 5 / 2.5 + 3; two micro-batches; no pieces given
    assert ledger.sums[2].tolist() == [8.0, 1.5, 3.5, 5.0, 2.0, 0.0, 0.0] and ledger.sums[2].dtype == torch.float64
    assert ledger.sums[4].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert len(COLUMNS) == 7
    ledger.clear()
    assert ledger.sums == {}


def test_pieces_with_every_label_right():
    ledger = Ledger()
    correct = torch.tensor([True, True, False, True, True])
    # pieces 0 (two tokens, both right), 2 (one of two right), 3 (its one token right); piece 1 has no counted token
    ledger.add(1, ExitLoss(torch.ones(5), correct), torch.ones(5), piece_n=torch.tensor([0, 0, 2, 2, 3]))
    sums = dict(zip(COLUMNS, ledger.sums[1].tolist(), strict=True))
    assert sums["pieces"] == 3 and sums["exact_pieces"] == 2 and sums["correct"] == 4
