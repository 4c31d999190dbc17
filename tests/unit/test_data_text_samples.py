"""Documents of text in windows, against plain PyTorch and by hand.

Attention between documents, positions, and what is trained.
"""

from itertools import product

import numpy as np
import pytest
import torch

from megatron_sorted.data.batches import collate
from megatron_sorted.data.indexed import Documents, IndexedWriter
from megatron_sorted.data.samples.corpus import Corpus
from megatron_sorted.data.samples.text_samples import DocumentMasks, TextSamples
from megatron_sorted.model.attention import make_attention_mask
from tests.support.text_stream import EOD, find_documents, write_documents

S = 16


def stream_of(seed: int, tokens: int = 400) -> list[int]:
    generator = np.random.default_rng(seed)
    return np.where(
        generator.random(tokens) < 0.15, EOD, generator.integers(8, 50, tokens)
    ).tolist()


@pytest.mark.parametrize("flags", product((False, True), repeat=3))
@pytest.mark.parametrize("separate_documents", [True, False])
def test_every_combination_of_flags_equals_megatrons_rule(tmp_path, flags, separate_documents):
    """Compare with Megatron's rule; with ``separate_documents`` False the stream is one document.

    Its ends are then the end tokens inside.
    """
    stream = stream_of(seed=4)
    prefix = write_documents(str(tmp_path / "stream"), stream, EOD if separate_documents else -1)
    source = TextSamples(
        Corpus([prefix]), S, 50, 3, 0, evaluation=True, masks=DocumentMasks(*flags, eod_id=EOD)
    )
    attention, positions, loss = flags
    samples = [source.sample(number) for number in range(source.samples_per_epoch)]
    assert source.packs == attention and len(samples) == 25
    for number, sample in enumerate(samples):
        tokens = torch.tensor(stream[number * S : (number + 1) * S])
        labels = stream[number * S + 1 : (number + 1) * S + 1]
        _, position, mask = find_documents(tokens)
        batch, count = collate([sample]), len(labels)
        assert (
            batch.tokens_bs[0, :count].tolist() == tokens.tolist()[:count]
            and batch.labels_bs[0, :count].tolist() == labels
        )
        assert (
            batch.loss_mask_bs[0, :count].tolist()
            == (mask if loss else torch.ones(S)).tolist()[:count]
        )
        assert not batch.loss_mask_bs[0, count:].any()
        assert (
            batch.positions_bs[0, :count].tolist()
            == (position if positions else torch.arange(S)).tolist()[:count]
        )
        sees = make_attention_mask(batch.tokens_bs, batch.pieces_bs, None, torch.float32)
        sees = torch.ones(S, S).tril().bool() if sees is None else sees[0, 0] == 0
        expected = torch.ones(S, S).tril().bool()
        for end in (
            (tokens == EOD).nonzero().flatten().tolist()
        ):  # Megatron-LM: what comes after an end sees nothing up to it
            if attention:
                expected[end + 1 :, : end + 1] = False
        assert torch.equal(sees[:count, :count], expected[:count, :count])


def write(prefix, documents) -> str:
    with IndexedWriter(str(prefix), np.uint16, with_modes=False) as writer:
        writer.append(
            Documents(
                np.array([token for document in documents for token in document]),
                np.array([*map(len, documents)]),
                np.ones(len(documents), np.int8),
                np.ones(len(documents), np.int32),
            )
        )
    return str(prefix)


def test_documents_without_an_end_token_end_where_the_file_says(tmp_path):
    prefix = write(tmp_path / "bare", [[10, 11, 12], [20], [30, 31, 32, 33, 34]])
    source = TextSamples(
        Corpus([prefix]), 4, 50, 3, 0, evaluation=True, masks=DocumentMasks(True, True, True)
    )
    one, two = source.sample(0), source.sample(1)
    assert one.tokens_s.tolist() == [10, 11, 12, 20] and one.labels_s.tolist() == [11, 12, 20, 30]
    assert one.segments_s.tolist() == [0, 0, 0, 1] and one.positions_s.tolist() == [0, 1, 2, 0]
    assert one.loss_mask_s.tolist() == [
        1,
        1,
        0,
        0,
    ]  # neither the second document nor the third follows from the one before
    assert (
        two.tokens_s.tolist() == [30, 31, 32, 33]
        and two.num_pieces == 1
        and two.loss_mask_s.tolist() == [1, 1, 1, 1]
    )
    assert (
        collate([two]).pieces_bs is None
    )  # one document in the window: plain causal attention, at its cost
    assert collate([two, one]).pieces_bs.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]


def test_an_end_token_at_the_border_of_windows(tmp_path):
    prefix = write(tmp_path / "borders", [[10, 11, 12, EOD], [20, 21, EOD], [EOD], [30, 31]])
    source = TextSamples(
        Corpus([prefix]),
        3,
        50,
        3,
        0,
        evaluation=True,
        masks=DocumentMasks(True, True, True, eod_id=EOD),
    )
    samples = [source.sample(number) for number in range(3)]
    assert [s.tokens_s.tolist() for s in samples] == [[10, 11, 12], [EOD, 20, 21], [EOD, EOD, 30]]
    assert [s.segments_s.tolist() for s in samples] == [[0, 0, 0], [0, 1, 1], [0, 1, 2]]
    assert [s.positions_s.tolist() for s in samples] == [[0, 1, 2], [0, 0, 1], [0, 0, 0]]
    assert [s.loss_mask_s.tolist() for s in samples] == [
        [1, 1, 1],
        [0, 1, 1],
        [0, 0, 1],
    ]  # the end token itself is predicted


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        (DocumentMasks(), "documents see those before them"),
        (DocumentMasks(True, True, True), "documents of a sample are separate"),
        (
            DocumentMasks(True, False, False),
            "separate, positions run through the sample, the next one's first token is predicted",
        ),
        (
            DocumentMasks(False, True, True),
            "see those before them, positions start again with each, the next one's first token "
            "is not",
        ),
    ],
)
def test_the_log_states_how_documents_share_a_sample(tmp_path, masks, text):
    source = TextSamples(
        Corpus([write(tmp_path / "few", [[10, 11, 12, 13]])]), 3, 50, 3, 0, masks=masks
    )
    assert text in source.describe()
