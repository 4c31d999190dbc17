"""Runs of agreement, counted by hand and by walking along every start."""

import pytest
import torch

from megatron_sorted.loss.agreement import accept_length, draft_counts, following_n


def follow(mask, positions=None, segments=None):
    """Return ``following_n`` of samples given as lists."""
    mask = torch.tensor(mask, dtype=torch.float32)
    positions = (
        torch.arange(mask.size(1)).expand(mask.shape)
        if positions is None
        else torch.tensor(positions)
    )
    return following_n(
        mask, positions, None if segments is None else torch.tensor(segments)
    ).tolist()


def test_following_in_sequence_then_batch_order():
    # two samples of three tokens: places 0..5 are (0, a) (0, b) (1, a) (1, b) (2, a) (2, b)
    assert follow([[1, 1, 1], [1, 1, 1]]) == [2, 3, 4, 5, 6, 6]


def test_a_token_that_does_not_count_ends_a_run():
    # counted: (0, a) (1, a) (1, b) (2, b) (3, a)
    assert follow([[1, 1, 0, 1], [0, 1, 1, 0]]) == [1, 5, 3, 5, 5]


def test_documents_and_seams_break_a_run():
    assert follow([[1, 1, 1, 1]], segments=[[0, 0, 1, 1]]) == [1, 4, 3, 4]
    # positions that start again, or the seam of two slices of a longer sequence
    assert follow([[1, 1, 1, 1]], positions=[[0, 1, 0, 1]]) == [1, 4, 3, 4]
    assert follow([[1, 1, 1, 1]], positions=[[2, 3, 12, 13]]) == [1, 4, 3, 4]
    assert follow([[0, 0]]) == []


def test_counts_by_hand():
    # one document of five tokens; agreement yes yes no yes yes; drafts of three
    agree = torch.tensor([True, True, False, True, True])
    seen, agreed = draft_counts(agree, torch.tensor([1, 2, 3, 4, 5]), 3).tolist()
    # k = 1: five starts, four agree. k = 2: after agreement at 0, 1, 3 (4 is the last token):
    # 0 agrees at 1, 3 at 4, 1 fails at 2.
    # k = 3: 0 fails at 2; 3 has no third token.
    assert (seen, agreed) == ([5, 3, 1], [4, 2, 0])
    assert accept_length(seen, agreed) == pytest.approx(1 + 4 / 5 + 4 / 5 * 2 / 3)


def test_nothing_counted():
    counts = draft_counts(torch.empty(0, dtype=torch.bool), torch.empty(0, dtype=torch.int64), 2)
    assert counts.tolist() == [[0, 0], [0, 0]] and accept_length(*counts.tolist()) == 1.0


def test_perfect_agreement_in_short_documents_is_not_held_against_the_exit():
    # documents of two tokens, drafts of four: none reaches a third token
    agree = torch.ones(6, dtype=torch.bool)
    counts = draft_counts(agree, torch.tensor([1, 6, 3, 6, 5, 6]), 4).tolist()
    assert counts == [[6, 3, 0, 0], [6, 3, 0, 0]] and accept_length(*counts) == 3.0


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5])
def test_on_a_ring_it_is_one_plus_the_mean_run(num_draft_tokens):
    # without an end every start sees all drafted tokens
    agree = torch.rand(200, generator=torch.Generator().manual_seed(4)) < 0.7
    place = torch.arange(200)
    counts = draft_counts(agree, (place + 1) % 200, num_draft_tokens)
    runs = []
    for start in range(200):
        run = 0
        while run < num_draft_tokens and agree[(start + run) % 200]:
            run += 1
        runs.append(run)
    assert accept_length(*counts.tolist()) == pytest.approx(1 + sum(runs) / 200)
