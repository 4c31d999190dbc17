"""A month of samples takes the memory of an hour, and a million documents open at once."""

import time
import tracemalloc
from itertools import islice

import numpy as np
import pytest

from megatron_sorted.data.batches import make_train_batches, open_train_samples
from megatron_sorted.data.indexed import Documents, IndexedWriter
from megatron_sorted.data.samples.packing import random_keys
from megatron_sorted.settings.run import Settings


def write(prefix, num_documents, mean, with_modes):
    lengths = 2 + (random_keys(num_documents, mean) % np.uint64(2 * mean)).astype(np.int64)
    tokens = (np.arange(lengths.sum()) % 1000).astype(np.uint16)
    sequences = (
        np.stack([np.ones(num_documents, int), lengths - 1], axis=1).ravel()
        if with_modes
        else lengths
    )
    modes = np.tile([0, 1], num_documents) if with_modes else np.ones(num_documents)
    with IndexedWriter(str(prefix), np.uint16, with_modes) as writer:
        writer.append(Documents(tokens, sequences, modes, np.full(num_documents, 1 + with_modes)))
    return str(prefix)


@pytest.mark.parametrize("kind", ["instructions", "text", "blend"])
def test_memory_does_not_grow_with_epochs(tmp_path, kind):
    a, b = write(tmp_path / "a", 250, 12, True), write(tmp_path / "b", 200, 20, False)
    arguments = {"instructions": (a,), "text": (b,), "blend": ("0.123456789", a, "1", b)}[kind]
    run = Settings(
        data_path=arguments,
        seq_length=128,
        vocab_size=1000,
        micro_batch_size=4,
        global_batch_size=8,
        split="1",
    )
    source = open_train_samples(run, None)
    per_epoch = source.samples_per_epoch

    def peak_of(first_epoch: int, num_epochs: int) -> int:
        """Return the peak of allocated bytes over some epochs, a step at a time."""
        tracemalloc.reset_peak()
        batches = make_train_batches(run, None, 0, 1, first_epoch * per_epoch, source)
        for batch in islice(batches, num_epochs * per_epoch // 4):
            assert batch.tokens_bs.shape == (4, 128)
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        peak_of(0, 2)
        first, later, much_later = peak_of(2, 2), peak_of(4, 5), peak_of(10**7, 2)
    finally:
        tracemalloc.stop()
    assert max(later, much_later) < 1.02 * first + 20_000


@pytest.mark.parametrize("with_modes", [True, False])
def test_a_million_documents_open_in_a_moment(tmp_path, with_modes):
    prefix = write(tmp_path / "many", 1_000_000, 6, with_modes)
    run = Settings(data_path=(prefix,), seq_length=1024, vocab_size=1000, split="1")
    started = time.process_time()
    source = open_train_samples(run, None)
    opened = time.process_time() - started
    source.sample(3 * source.samples_per_epoch + 5)
    reshuffled = time.process_time() - started - opened
    again = time.process_time()
    for index in range(20):
        source.sample(3 * source.samples_per_epoch + 50 + index)
    assert opened < 2 and reshuffled < 3 and time.process_time() - again < 2
    assert "1000000 documents" in source.describe()
