"""Windows: every token is predicted once."""

import pytest

from megatron_sorted.evaluation.documents import EncodedDocument
from megatron_sorted.evaluation.windows import Window, batch_windows, cut_documents, cut_windows


def test_a_table_by_hand():
    assert cut_windows(7, 3, 3) == [Window(0, 0, 3, 1), Window(0, 3, 6, 4), Window(0, 6, 7, 7)]
    assert cut_windows(7, 4, 2) == [Window(0, 0, 4, 1), Window(0, 2, 6, 5), Window(0, 4, 7, 7)]
    assert cut_windows(3, 4, 2) == [Window(0, 0, 3, 1)] and cut_windows(0, 4, 4) == []


@pytest.mark.parametrize("num_targets", range(1, 12))
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (3, 1), (3, 2), (4, 4), (20, 7)])
def test_each_token_is_predicted_once_with_enough_before_it(num_targets, length, stride):
    targets = []
    for window in cut_windows(num_targets, length, stride):
        assert window.num_read <= length and window.first < window.first_target <= window.last
        for target in range(window.first_target, window.last + 1):
            targets.append(target)
            assert target - window.first >= min(target, length - stride + 1)
    assert targets == list(range(1, num_targets + 1))


def test_windows_of_prompts_alone_are_not_run_and_batches_hold_what_they_may():
    documents = [
        EncodedDocument([1] * 9, [False] * 7 + [True, True]),
        EncodedDocument([1] * 4, [False] * 4),
        EncodedDocument([1, 1], [False, True]),
    ]
    windows = cut_documents(documents, 3, 3)
    assert windows == [Window(0, 6, 8, 7), Window(2, 0, 1, 1)]
    windows = [Window(0, 0, n, 1) for n in (2, 5, 3, 5, 1)]
    assert [[w.num_read for w in batch] for batch in batch_windows(windows, 10)] == [
        [5, 5],
        [3, 2, 1],
    ]
    assert [[w.num_read for w in batch] for batch in batch_windows(windows, 1)] == [
        [5],
        [5],
        [3],
        [2],
        [1],
    ]
