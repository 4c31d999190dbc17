"""Samples of tiny corpora, computed by hand."""

import numpy as np
import pytest

from megatron_sorted.data.indexed import Documents, IndexedWriter
from megatron_sorted.data.samples.corpus import Corpus
from megatron_sorted.data.samples.dataset import (
    EvaluationSet,
    InstructionSamples,
    MockSamples,
    open_samples,
)
from megatron_sorted.data.samples.text_samples import TextSamples
from megatron_sorted.errors import DataError


def write(prefix, documents, with_modes):
    """Write documents given as lists of (tokens, mode)."""
    parts = [part for document in documents for part in document]
    with IndexedWriter(str(prefix), np.uint16, with_modes) as writer:
        writer.append(
            Documents(
                np.array([t for tokens, _ in parts for t in tokens]),
                np.array([len(tokens) for tokens, _ in parts]),
                np.array([mode for _, mode in parts], np.int8),
                np.array([len(d) for d in documents], np.int32),
            )
        )
    return str(prefix)


@pytest.fixture
def instructions(tmp_path):
    return write(
        tmp_path / "few",
        [
            [([10, 11, 12], 0), ([13, 14], 1)],  # 4 positions, loss at 13, 14
            [([20], 0), ([21], 1), ([22, 23], 0), ([24, 2], 1)],  # 5 positions, loss at 21, 24, 2
            [([30], 0), ([31, 2], 1)],  # 2 positions
            [([40], 1)],  # predicts nothing
        ],
        with_modes=True,
    )


def test_packed_window_by_hand(instructions):
    source = InstructionSamples(
        Corpus([instructions]), seq_length=8, vocab_size=50, pad_id=3, seed=0
    )
    # Best fit decreasing of 5, 4, 2 in 8: {5, 2}, {4}.
    assert source.samples_per_epoch == 2 and source.fill == 11 / 16
    samples = [source.sample(i) for i in range(2)]
    one = next(s for s in samples if s.num_pieces == 1)
    assert one.tokens_s.tolist() == [10, 11, 12, 13, 3, 3, 3, 3]
    assert one.labels_s.tolist() == [11, 12, 13, 14, 3, 3, 3, 3]
    assert one.loss_mask_s.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert one.segments_s.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    two = next(s for s in samples if s.num_pieces == 2)
    long = {"tokens": [20, 21, 22, 23, 24], "labels": [21, 22, 23, 24, 2], "mask": [1, 0, 0, 1, 1]}
    short = {"tokens": [30, 31], "labels": [31, 2], "mask": [1, 1]}
    first, second = (long, short) if two.tokens_s[0] == 20 else (short, long)
    assert two.tokens_s.tolist() == [*first["tokens"], *second["tokens"], 3]
    assert two.labels_s.tolist() == [*first["labels"], *second["labels"], 3]
    assert two.loss_mask_s.tolist() == [*first["mask"], *second["mask"], 0]
    assert two.segments_s.tolist() == [0] * len(first["tokens"]) + [1] * len(second["tokens"]) + [2]


def test_both_orders_inside_a_window_occur(instructions):
    source = InstructionSamples(Corpus([instructions]), 8, 50, 3, seed=0)
    packed = [s for s in (source.sample(i) for i in range(40)) if s.num_pieces == 2]
    assert len(packed) == 20 and {int(s.tokens_s[0]) for s in packed} == {20, 30}


def test_longest_document_that_fits(instructions):
    assert (
        InstructionSamples(Corpus([instructions]), 5, 50, 0, 0).samples_per_epoch == 3
    )  # {5}, {4}, {2}
    with pytest.raises(
        DataError,
        match=r"few: document 1 has 6 tokens, but --seq-length 4 holds at most 5 "
        r"\(1 such.*longest 6",
    ):
        InstructionSamples(Corpus([instructions]), 4, 50, 0, 0)


def test_token_outside_the_vocabulary_is_an_error(instructions):
    source = InstructionSamples(Corpus([instructions]), 8, 31, 0, 0)
    with pytest.raises(
        DataError, match="few: document 2: token 31 is outside the model's vocabulary of 31"
    ):
        [source.sample(i) for i in range(2)]


def test_epochs_hold_each_document_once_and_differ(tmp_path):
    prefix = write(
        tmp_path / "many",
        [[([i], 0), ([1000 + i] * (1 + i % 7), 1)] for i in range(60)],
        with_modes=True,
    )
    source = open_samples(Corpus([prefix]), 16, 2000, 0, seed=5)
    epochs = []
    for epoch in range(3):
        seen = []
        for index in range(
            epoch * source.samples_per_epoch, (epoch + 1) * source.samples_per_epoch
        ):
            sample = source.sample(index)
            starts = [
                np.flatnonzero(sample.segments_s == piece)[0] for piece in range(sample.num_pieces)
            ]
            seen += sample.tokens_s[starts].tolist()
        assert sorted(seen) == list(range(60))
        epochs.append(seen)
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    fresh = open_samples(Corpus([prefix]), 16, 2000, 0, seed=5)
    late = 2 * source.samples_per_epoch + 3
    assert fresh.sample(late).tokens_s.tolist() == source.sample(late).tokens_s.tolist()


@pytest.fixture
def text(tmp_path):
    return write(
        tmp_path / "text", [[([1, 2, 3], 1)], [([4, 5], 1)], [([6, 7, 8, 9], 1)]], with_modes=False
    )


def test_text_for_evaluation_is_one_padded_pass(text):
    samples = EvaluationSet(TextSamples(Corpus([text]), 3, 50, 0, 9, evaluation=True))
    # 9 tokens, 8 labels: windows of 3, 3 and 2.
    assert [s.tokens_s.tolist() for s in samples] == [[1, 2, 3], [4, 5, 6], [7, 8, 0]]
    assert [s.labels_s.tolist() for s in samples] == [[2, 3, 4], [5, 6, 7], [8, 9, 0]]
    assert [s.loss_mask_s.tolist() for s in samples] == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert [s.num_pieces for s in samples] == [1, 1, 1] and len(samples) == 3


def test_text_for_training_is_the_shuffled_stream(text):
    source = TextSamples(Corpus([text]), 3, 50, 0, seed=2)
    assert source.samples_per_epoch == 2  # 8 labels: the last 2 of an epoch are left
    streams = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    possible = [
        [*streams[a], *streams[b], *streams[c]]
        for a, b, c in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    ]
    used = set()
    for epoch in range(30):
        windows = sorted(
            (
                source.sample(2 * epoch + i).tokens_s.tolist(),
                source.sample(2 * epoch + i).labels_s.tolist(),
            )
            for i in range(2)
        )
        matching = [
            i
            for i, s in enumerate(possible)
            if sorted([(s[0:3], s[1:4]), (s[3:6], s[4:7])]) == windows
        ]
        assert len(matching) == 1
        used.add(matching[0])
    assert used == set(range(6))


def test_too_little_text(text):
    with pytest.raises(DataError, match=r"9 tokens in this share are too few.*it takes 10"):
        TextSamples(Corpus([text]), 9, 50, 0, 0)


def test_corpora_are_numbered_consecutively_and_split_per_file(text, tmp_path):
    other = write(tmp_path / "other", [[([21], 1)], [([22, 23], 1)]], with_modes=False)
    corpus = Corpus([text, other])
    assert [corpus.document(i).tolist() for i in range(5)] == [
        [1, 2, 3],
        [4, 5],
        [6, 7, 8, 9],
        [21],
        [22, 23],
    ]
    assert corpus.name_of(4).endswith("other: document 1")
    assert Corpus([text, other], (0, 0.6)).lengths.tolist() == [
        3,
        2,
        1,
    ]  # round(1.8) and round(1.2) documents
    parts = [Corpus([text, other], share) for share in ((0, 0.6), (0.6, 1))]
    assert sorted(tuple(p.document(i).tolist()) for p in parts for i in range(p.num_documents)) == [
        (1, 2, 3),
        (4, 5),
        (6, 7, 8, 9),
        (21,),
        (22, 23),
    ]


def test_kinds_do_not_mix(text, instructions):
    with pytest.raises(DataError, match="mix instruction data and plain text"):
        Corpus([text, instructions])


def test_evaluation_ignores_the_seed(instructions):
    orders = [
        [
            EvaluationSet(open_samples(Corpus([instructions]), 5, 50, 0, seed, evaluation=True))[
                i
            ].tokens_s.tolist()
            for i in range(3)
        ]
        for seed in range(4)
    ]
    assert all(order == orders[0] for order in orders)


def test_mock_tokens_follow_seed_and_index():
    source = MockSamples(16, 7, seed=1, samples_per_epoch=4)
    assert (
        source.sample(3).tokens_s.tolist() == MockSamples(16, 7, 1, 9).sample(3).tokens_s.tolist()
    )
    assert source.sample(3).tokens_s.tolist() != source.sample(4).tokens_s.tolist()
    assert source.sample(3).tokens_s[1:].tolist() == source.sample(3).labels_s[:-1].tolist()
    assert {int(t) for i in range(50) for t in source.sample(i).tokens_s} == set(range(7))
