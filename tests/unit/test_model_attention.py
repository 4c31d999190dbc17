"""Where a token may look: its own document, as far back as the window."""

import torch
from transformers.masking_utils import sliding_window_causal_mask_function

from megatron_sorted.model.attention import make_attention_mask

INF = float("inf")


def make(tokens: int, segments=None, window: int | None = None, dtype=torch.float32):
    pieces_bs = None if segments is None else torch.tensor([segments])
    return make_attention_mask(torch.zeros(1, tokens, dtype=torch.int64), pieces_bs, window, dtype)


def test_mask_keeps_packed_documents_apart():
    expected = [
        [[[0, -INF, -INF, -INF], [0, 0, -INF, -INF], [-INF, -INF, 0, -INF], [-INF, -INF, 0, 0]]]
    ]
    assert make(4, [0, 0, 1, 1]).tolist() == expected == make(4, [0, 0, 1, 1], window=4).tolist()


def test_no_mask_is_made_where_a_token_sees_all_before_it():
    assert make(4) is None and make(4, window=4) is None and make(4, window=9) is None


def test_a_window_counts_the_token_itself_as_in_transformers():
    mask = make(5, window=2)
    assert mask.tolist() == [
        [
            [
                [0, -INF, -INF, -INF, -INF],
                [0, 0, -INF, -INF, -INF],
                [-INF, 0, 0, -INF, -INF],
                [-INF, -INF, 0, 0, -INF],
                [-INF, -INF, -INF, 0, 0],
            ]
        ]
    ]
    for window in range(1, 6):
        sees = sliding_window_causal_mask_function(window)
        mask = make(6, window=window, dtype=torch.bfloat16)
        assert mask.dtype == torch.bfloat16 and mask.shape == (1, 1, 6, 6)
        assert [
            [bool(sees(0, 0, torch.tensor(i), torch.tensor(j))) for j in range(6)] for i in range(6)
        ] == (mask[0, 0] == 0).tolist()


def test_a_window_within_packed_documents():
    mask = make(6, [0, 0, 0, 0, 1, 1], window=3)[0, 0] == 0
    assert [row.nonzero().squeeze(1).tolist() for row in mask] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [1, 2, 3],
        [4],
        [4, 5],
    ]


def test_the_mask_of_a_window_is_made_once():
    assert make(64, window=3) is make(64, window=3)
