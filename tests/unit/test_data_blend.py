"""The samples of a blend: those of its sources, in given shares and of different kinds."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_sorted.data.batches import collate, open_train_samples
from megatron_sorted.data.indexed import Documents, IndexedWriter
from megatron_sorted.data.samples.blend import BlendedSamples
from megatron_sorted.data.samples.dataset import MockSamples
from megatron_sorted.errors import DataError
from megatron_sorted.settings.run import Settings


@pytest.fixture
def files(tmp_path):
    """Return an instruction file and a text of 41 tokens.

    The first holds 10 documents of 5 tokens, two of which fill a window of 8.
    """
    with IndexedWriter(str(tmp_path / "i"), np.uint16, with_modes=True) as writer:
        writer.append(
            Documents(np.arange(50), np.tile([2, 3], 10), np.tile([0, 1], 10), np.full(10, 2))
        )
    with IndexedWriter(str(tmp_path / "t"), np.uint16, with_modes=False) as writer:
        writer.append(Documents(50 + np.arange(41), np.array([41]), np.ones(1), np.ones(1, int)))
    return {name: str(tmp_path / name) for name in "it"}


def run_of(*arguments, **changes):
    return replace(
        Settings(data_path=arguments, seq_length=8, vocab_size=100, split="1", seed=7), **changes
    )


def test_samples_are_the_sources_own_in_order(files):
    blend = open_train_samples(run_of("1", files["i"], "2", files["t"]), None)
    alone = {name: open_train_samples(run_of(prefix), None) for name, prefix in files.items()}
    assert isinstance(blend, BlendedSamples) and blend.packs
    apart = {"t": True, "without resets": False, "i": True}
    assert apart == {
        "t": alone["t"].packs,
        "i": alone["i"].packs,
        "without resets": open_train_samples(
            run_of(files["t"], reset_attention_mask=False), None
        ).packs,
    }
    seen = {"i": 0, "t": 0}
    for index in range(60):
        sample = blend.sample(index)
        name = "i" if sample.tokens_s.min() < 50 else "t"
        assert sample.tokens_s.tolist() == alone[name].sample(seen[name]).tokens_s.tolist()
        seen[name] += 1
        assert abs(seen["i"] - (index + 1) / 3) < 1
    assert seen == {"i": 20, "t": 40}


def test_epochs(files):
    # the instructions make 5 samples, the text 40 // 8 = 5
    blend = open_train_samples(run_of("1", files["i"], "3", files["t"]), None)
    assert (
        blend.epochs_at(20) == {files["i"]: 1.0, files["t"]: 3.0}
        and blend.epoch_at(20) == 0.25 * 1 + 0.75 * 3
    )
    assert (
        blend.samples_per_epoch == 8 and blend.epoch_at(0) == 0.0
    )  # a quarter of 2/5, three quarters of 6/5: one pass
    alone = open_train_samples(run_of(files["t"]), None)
    assert alone.epoch_at(12) == 2.4 and MockSamples(4, 9, 0, 10).epoch_at(25) == 2.5


def test_description_names_every_source(files):
    blend = open_train_samples(run_of("0.5", files["i"], "1.5", files["t"]), None)
    assert blend.describe().splitlines() == [
        "blend of 2 sources, 100.0 % filled; one pass is about 8 samples",
        f"  25 % {files['i']} (weight 0.5): 10 documents in 5 samples of 8 positions, 100.0 % "
        "filled",
        f"  75 % {files['t']} (weight 1.5): 1 documents, 41 tokens in 5 samples of 8 positions; "
        "documents of a sample are separate",
    ]
    half = open_train_samples(run_of("1", files["i"], "1", files["t"], seq_length=7), None)
    assert half.fill == (40 / 70 + 1) / 2  # one document of 4 positions a window of 7


def test_one_batch_of_both_kinds(files):
    blend = open_train_samples(run_of("1", files["i"], "1", files["t"]), None)
    samples = [blend.sample(index) for index in range(2)]
    packed = 0 if samples[0].num_pieces == 2 else 1
    batch = collate(samples)
    assert (
        batch.pieces_bs[packed].tolist() == [0] * 4 + [1] * 4
        and batch.positions_bs[packed].tolist() == [0, 1, 2, 3] * 2
    )
    assert batch.loss_mask_bs[packed].tolist() == [0, 1, 1, 1] * 2
    # running text: one piece, all of it trained on, as in a batch of text alone
    assert batch.pieces_bs[1 - packed].tolist() == [0] * 8 and batch.positions_bs[
        1 - packed
    ].tolist() == list(range(8))
    assert batch.loss_mask_bs[1 - packed].tolist() == [1] * 8
    alone = collate([samples[1 - packed]])
    assert alone.pieces_bs is None and alone.positions_bs[0].tolist() == list(range(8))


def test_without_weights_kinds_do_not_mix(files):
    with pytest.raises(DataError, match="Give each a weight"):
        open_train_samples(run_of(files["i"], files["t"]), None)
