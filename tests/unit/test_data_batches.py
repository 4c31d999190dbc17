"""Micro-batches: which samples a rank gets, and what a batch holds."""

from dataclasses import replace
from itertools import islice
from zlib import crc32

import numpy as np
import pytest
import torch

from megatron_sorted.data.batches import (
    collate,
    make_eval_batches,
    make_eval_sets,
    make_test_sets,
    make_train_batches,
    num_eval_batches,
    open_train_samples,
)
from megatron_sorted.data.indexed import Documents, IndexedWriter
from megatron_sorted.data.samples.sample import Sample
from megatron_sorted.data.tokenizer import load_tokenizer
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.settings.run import Settings


@pytest.fixture
def settings(tmp_path):
    """Return settings for 24 documents of 5 tokens, whose first token is their number.

    One document fills a window of 4 positions.
    """
    count, prefix = 24, str(tmp_path / "numbers_text_document")
    tokens = np.stack([np.arange(count), *[np.full(count, 30 + i) for i in range(4)]], axis=1)
    with IndexedWriter(prefix, np.uint16, with_modes=True) as writer:
        writer.append(
            Documents(
                tokens.ravel(), np.tile([2, 3], count), np.tile([0, 1], count), np.full(count, 2)
            )
        )
    return Settings(
        data_path=(prefix,),
        valid_data_path=(prefix,),
        seq_length=4,
        vocab_size=64,
        micro_batch_size=2,
        global_batch_size=8,
    )


def firsts(batches, count):
    return [batch.tokens_bs[:, 0].tolist() for batch in islice(batches, count)]


def test_ranks_take_their_part_of_each_global_batch(settings):
    order = [i for batch in firsts(make_train_batches(settings, None, 0, 1), 12) for i in batch]
    assert sorted(order) == list(range(24)) and order != list(range(24))
    # Global batch 8, micro-batch 2, two ranks: rank 0 gets samples 0 1, 4 5, then 8 9, 12 13; rank
    # 1 the others.
    assert firsts(make_train_batches(settings, None, 0, 2), 4) == [
        order[0:2],
        order[4:6],
        order[8:10],
        order[12:14],
    ]
    assert firsts(make_train_batches(settings, None, 1, 2), 4) == [
        order[2:4],
        order[6:8],
        order[10:12],
        order[14:16],
    ]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_layout(settings, dp_size):
    reference = [i for batch in firsts(make_train_batches(settings, None, 0, 1), 20) for i in batch]
    per_rank = [
        firsts(make_train_batches(settings, None, rank, dp_size), 20 // dp_size)
        for rank in range(dp_size)
    ]
    micro = 4 // dp_size
    for g in range(5):
        union = [
            i for rank in per_rank for batch in rank[g * micro : (g + 1) * micro] for i in batch
        ]
        assert sorted(union) == sorted(reference[g * 8 : (g + 1) * 8])


def test_a_resumed_run_continues_at_the_next_sample(settings):
    straight = firsts(make_train_batches(settings, None, 1, 2), 20)
    assert firsts(make_train_batches(settings, None, 1, 2, start_sample=5 * 8), 10) == straight[10:]


def test_contents_of_a_batch(settings):
    batch = next(make_train_batches(settings, None, 0, 1))
    number = int(batch.tokens_bs[0, 0])
    assert batch.tokens_bs[0].tolist() == [number, 30, 31, 32] and batch.labels_bs[0].tolist() == [
        30,
        31,
        32,
        33,
    ]
    assert batch.loss_mask_bs.tolist() == [[0, 1, 1, 1]] * 2 and batch.num_tokens == 6
    assert batch.pieces_bs is None and batch.positions_bs.tolist() == [[0, 1, 2, 3]] * 2
    assert (
        batch.tokens_bs.dtype,
        batch.labels_bs.dtype,
        batch.positions_bs.dtype,
        batch.loss_mask_bs.dtype,
    ) == (torch.int64, torch.int64, torch.int64, torch.float32)
    rows = [
        tokens.numpy().tobytes() + labels.numpy().tobytes()
        for tokens, labels in zip(batch.tokens_bs, batch.labels_bs, strict=True)
    ]
    assert batch.checksum == crc32(rows[0]) + crc32(rows[1]) == batch.to("cpu").checksum


def test_positions_start_again_with_each_piece():
    zeros = np.zeros(6, np.int64)
    samples = [
        Sample(zeros, zeros, zeros.astype(np.float32), np.array(segments, np.int32), pieces)
        for segments, pieces in (([0, 0, 0, 1, 1, 2], 2), ([0, 0, 0, 0, 1, 1], 1))
    ]
    batch = collate(samples)
    assert batch.positions_bs.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]
    assert (
        batch.pieces_bs.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1]]
        and batch.pieces_bs.dtype == torch.int32
    )
    assert collate(samples[1:]).pieces_bs is None and collate(
        samples[1:]
    ).positions_bs.tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_evaluation_sees_each_sample_once_and_pads(settings, dp_size):
    settings = replace(
        settings, global_batch_size=16
    )  # 24 samples: 2 global batches, 8 empty samples
    samples = make_eval_sets(settings, None)["numbers"]
    assert len(samples) == 24 and num_eval_batches(settings, samples, dp_size) == 2
    batches = [list(make_eval_batches(settings, samples, rank, dp_size)) for rank in range(dp_size)]
    assert {len(own) for own in batches} == {16 // dp_size}
    seen = [
        int(row[0])
        for own in batches
        for b in own
        for row, mask in zip(b.tokens_bs, b.loss_mask_bs, strict=True)
        if mask.sum()
    ]
    assert (
        sorted(seen) == list(range(24)) and sum(b.num_tokens for own in batches for b in own) == 72
    )
    assert (
        sum(b.num_tokens for b in make_eval_batches(settings, samples, 0, 1, num_batches=1)) == 48
    )


def test_split_shares_documents_without_overlap(settings):
    settings = replace(settings, valid_data_path=(), split="75,25")
    trained = [i for batch in firsts(make_train_batches(settings, None, 0, 1), 9) for i in batch]
    held_out = [int(sample.tokens_s[0]) for sample in make_eval_sets(settings, None)["numbers"]]
    assert sorted(trained) == list(range(18)) and sorted(held_out) == list(range(18, 24))
    assert make_eval_sets(replace(settings, split="100,0"), None) == {}


def numbers(sets):
    return {
        name: sorted(int(sample.tokens_s[0]) for sample in samples)
        for name, samples in sets.items()
    }


def test_split_into_training_validation_and_test(settings):
    settings = replace(settings, valid_data_path=(), split="4,1,1")
    assert sorted(
        i for batch in firsts(make_train_batches(settings, None, 0, 1), 8) for i in batch
    ) == list(range(16))
    assert numbers(make_eval_sets(settings, None)) == {"numbers": list(range(16, 20))}
    assert numbers(make_test_sets(settings, None)) == {"numbers": list(range(20, 24))}
    assert make_test_sets(replace(settings, split="5,1"), None) == {}
    assert make_eval_sets(replace(settings, split="5,0,1"), None) == {}
    # in a blend the shares are those of each of its files
    blend = replace(settings, data_path=("1", settings.data_path[0]))
    assert numbers(make_eval_sets(blend, None)) == {"numbers": list(range(16, 20))}
    assert sorted(
        i for batch in firsts(make_train_batches(blend, None, 0, 1), 8) for i in batch
    ) == list(range(16))


def test_data_of_their_own_for_validation_and_test(settings):
    own = replace(settings, test_data_path=settings.data_path, split="75,25")
    assert (
        numbers(make_test_sets(own, None))
        == numbers(make_eval_sets(own, None))
        == {"numbers": list(range(24))}
    )
    own = replace(own, valid_data_path=())
    assert numbers(make_test_sets(own, None)) == {"numbers": list(range(24))}
    assert numbers(make_eval_sets(own, None)) == {"numbers": list(range(18, 24))}
    with pytest.raises(SettingsError, match="--test-data-path: two sets are called 'numbers'"):
        make_test_sets(replace(own, test_data_path=own.data_path * 2), None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"split": "a,b", "valid_data_path": ()}, SettingsError, "--split: 'a,b'"),
        ({"data_path": ()}, SettingsError, "--data-path"),
        ({"vocab_size": None}, SettingsError, "--vocab-size"),
        ({"vocab_size": 33}, DataError, "token 33 is outside the model's vocabulary of 33"),
    ],
)
def test_mistakes(settings, change, error, message):
    with pytest.raises(error, match=message):
        list(islice(make_train_batches(replace(settings, **change), None, 0, 2), 12))


def test_tokenizer_must_fit_the_model(settings):
    with pytest.raises(
        DataError,
        match="--vocab-size: the model has a vocabulary of 64, but texts of tokenizer null-65",
    ):
        make_train_batches(settings, load_tokenizer("NullTokenizer", None, 65), 0, 1)
    assert (
        next(
            make_train_batches(settings, load_tokenizer("NullTokenizer", None, 64), 0, 1)
        ).num_tokens
        == 6
    )


def test_two_sets_of_one_name(settings):
    with pytest.raises(SettingsError, match="two sets are called 'numbers'"):
        make_eval_sets(replace(settings, valid_data_path=settings.data_path * 2), None)


def test_mock_data():
    settings = Settings(
        mock_data=True,
        vocab_size=10,
        seq_length=4,
        micro_batch_size=2,
        global_batch_size=4,
        eval_iters=3,
    )
    batch = next(make_train_batches(settings, None, 1, 2))
    assert batch.tokens_bs.shape == (2, 4) and batch.num_tokens == 8 and batch.pieces_bs is None
    assert (
        len(make_eval_sets(settings, None)["mock"]) == 12 and make_test_sets(settings, None) == {}
    )


def test_training_data_without_a_trained_token_are_refused(tmp_path, settings):
    """Prompts alone, and a response that is a document's first token, which nothing predicts."""
    prefix = str(tmp_path / "prompts_text_document")
    with IndexedWriter(prefix, np.uint16, with_modes=True) as writer:
        writer.append(
            Documents(np.arange(7), np.array([3, 1, 3]), np.array([0, 1, 0]), np.array([1, 2]))
        )
    for given in ((prefix,), ("1", settings.data_path[0], "2", prefix)):
        with pytest.raises(
            DataError, match="none of the 2 documents in this share has a token that is trained on"
        ):
            open_train_samples(replace(settings, data_path=given, split="100,0"), 64)
    # to evaluate on them is no error: their loss is reported as none
    assert make_eval_sets(replace(settings, valid_data_path=(prefix,)), 64)
