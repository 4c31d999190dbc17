"""The samples that a run sees: the same for every number of processes and after every restart.

They are also those of earlier versions.
"""

from dataclasses import replace
from itertools import islice
from zlib import crc32

import numpy as np
import pytest

from megatron_sorted.data.batches import collate, make_train_batches, open_train_samples
from megatron_sorted.data.indexed import Documents, IndexedWriter
from megatron_sorted.data.samples.packing import shuffled
from megatron_sorted.settings.run import Settings

SEQ_LENGTH = 32


def write(prefix, first, count, with_modes):
    """Write ``count`` documents of 3 to 30 tokens, the first token of each its number."""
    lengths = 3 + shuffled(count, first, 99) % 28
    tokens = np.concatenate(
        [
            np.concatenate([[first + i], 1000 + (np.arange(n - 1) + i) % 900])
            for i, n in enumerate(lengths.tolist())
        ]
    )
    if with_modes:
        sequences = np.stack([np.full(count, 2), lengths - 2], axis=1).ravel()
        documents = Documents(tokens, sequences, np.tile([0, 1], count), np.full(count, 2))
    else:
        documents = Documents(tokens, lengths, np.ones(count), np.ones(count, int))
    with IndexedWriter(str(prefix), np.uint16, with_modes) as writer:
        writer.append(documents)
    return str(prefix)


@pytest.fixture
def files(tmp_path):
    """Return prefixes of two instruction files and a text file."""
    return {
        "a": write(tmp_path / "a", 0, 60, True),
        "b": write(tmp_path / "b", 100, 25, True),
        "t": write(tmp_path / "t", 200, 40, False),
    }


def run_of(*arguments, **changes):
    base = Settings(
        data_path=arguments,
        seq_length=SEQ_LENGTH,
        vocab_size=2000,
        micro_batch_size=2,
        global_batch_size=8,
        split="90,10",
    )
    return replace(base, **changes)


def rows(batches, count):
    """Return the rows of the first ``count`` micro-batches."""
    return [row.tolist() for batch in islice(batches, count) for row in batch.tokens_bs]


# the second column was recorded with version 0.1.0, whose runs must continue with the same data
@pytest.mark.parametrize(
    ("names", "pinned"), [("a", 3120363750), ("ab", 835877626), ("t", 222950771)]
)
def test_order_of_earlier_versions(files, names, pinned):
    samples = open_train_samples(
        run_of(*(files[name] for name in names), reset_attention_mask=False), None
    )
    parts = [samples.sample(index) for index in range(3 * samples.samples_per_epoch)]
    assert (
        crc32(
            b"".join(
                np.concatenate([s.tokens_s, s.labels_s, s.segments_s]).tobytes() for s in parts
            )
        )
        == pinned
    )


BLENDS = [("a",), ("0.3", "a", "0.7", "b"), ("2", "a", "1", "b", "0.123456789", "t")]


@pytest.fixture(params=BLENDS, ids=" ".join)
def run(request, files):
    """Return a run on one of the blends, one of them of both kinds of data."""
    return run_of(*(files.get(word, word) for word in request.param))


def test_order_depends_on_neither_processes_nor_restarts(run):
    source = open_train_samples(run, None)
    order = [source.sample(index).tokens_s.tolist() for index in range(96)]
    for dp_size in (1, 2, 4):
        ranks = [
            rows(make_train_batches(run, None, rank, dp_size), 48 // dp_size)
            for rank in range(dp_size)
        ]
        steps = [
            [row for rank in ranks for row in rank[g * 8 // dp_size : (g + 1) * 8 // dp_size]]
            for g in range(12)
        ]
        assert [sorted(step) for step in steps] == [
            sorted(order[g * 8 : (g + 1) * 8]) for g in range(12)
        ]
        # and in which order: micro-batch m of rank d holds samples m * 2 * dp + 2 d and the next
        assert [row for m in range(4) for rank in ranks for row in rank[2 * m : 2 * m + 2]][
            :8
        ] == order[:8]
    for start in range(
        0, 90, 7
    ):  # at any sample, not only where a step ends, with fresh files and caches
        assert (
            rows(make_train_batches(run, None, 0, 1, start_sample=start), 3)
            == order[start : start + 6]
        )


def test_another_batch_size_continues_at_the_right_sample(run):
    source = open_train_samples(run, None)
    order = [source.sample(index).tokens_s.tolist() for index in range(96)]
    for batch, micro in ((12, 2), (6, 3), (1, 1), (24, 4)):
        other = replace(run, global_batch_size=batch, micro_batch_size=micro)
        assert (
            rows(make_train_batches(other, None, 0, 1, start_sample=40), 48 // micro)
            == order[40:88]
        )


def test_checksum_of_a_step_does_not_depend_on_the_grouping(run):
    source = open_train_samples(run, None)
    expected = [
        sum(
            crc32(sample.tokens_s.tobytes() + sample.labels_s.tobytes())
            for sample in (source.sample(index) for index in range(g * 8, g * 8 + 8))
        )
        for g in range(6)
    ]
    for dp_size, micro in ((1, 1), (1, 2), (1, 8), (2, 2), (4, 1)):
        settings = replace(run, micro_batch_size=micro)
        sums = [0] * 6
        for rank in range(dp_size):
            per_step = 8 // micro // dp_size
            for number, batch in enumerate(
                islice(make_train_batches(settings, None, rank, dp_size), 6 * per_step)
            ):
                sums[number // per_step] += batch.to("cpu").checksum
        assert sums == expected
    sample = source.sample(0)
    flipped = replace(sample, labels_s=sample.labels_s + (np.arange(SEQ_LENGTH) == 3))
    assert collate([sample]).checksum != collate([flipped]).checksum


def test_seed_and_weights_change_the_order(files):
    runs = [
        run_of(x, files["a"], y, files["b"], seed=seed)
        for x, y, seed in (("0.3", "0.7", 1), ("0.3", "0.7", 2), ("0.4", "0.6", 1))
    ]
    orders = [rows(make_train_batches(run, None, 0, 1), 20) for run in runs]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    scaled = run_of("3", files["a"], "7", files["b"], seed=1)
    assert rows(make_train_batches(scaled, None, 0, 1), 20) == orders[0]
