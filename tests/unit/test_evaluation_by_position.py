"""Losses by position, against plain transformers window by window."""

import re
import statistics
from argparse import Namespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatron_sorted.commands.options.position_checks import check_positions
from megatron_sorted.errors import DataError, SettingsError, SortedError
from megatron_sorted.evaluation import held_out
from megatron_sorted.evaluation.by_position import check_length, measure_by_position
from megatron_sorted.evaluation.documents import Document, EncodedDocument
from megatron_sorted.evaluation.evaluate import Subject
from megatron_sorted.evaluation.nested_model import load_nested_model
from megatron_sorted.evaluation.positions import Positions, cut_positions
from megatron_sorted.evaluation.windows import join_documents
from megatron_sorted.exported.generation_defaults import GenerationDefaults
from megatron_sorted.exported.tokenizer import open_tokenizer
from tests.support.evaluated import VOCAB_SIZE, write_model

LENGTH = 24
"""Longer than the 16 positions of the models here."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "m", max_position_embeddings=16)


def documents():
    """Return documents of 0 to 3 whole windows; in the last one only some tokens count."""
    generator, made = torch.Generator().manual_seed(5), []
    for length in (24, 10, 50, 73, 30):
        ids = [1, *torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()]
        counted = [length != 30 or place >= 20 for place in range(length)]
        made.append(EncodedDocument(ids, [False, *counted]))
    return made


def plain_windows(made, joined):
    """Return (document, tokens read, right tokens, which count) of each window, cut by hand."""
    if joined:
        made = [
            EncodedDocument(
                [token for one in made for token in one.ids],
                [is_counted for one in made for is_counted in one.counted],
            )
        ]
    return [
        (
            number,
            one.ids[first : first + LENGTH],
            one.ids[first + 1 : first + LENGTH + 1],
            one.counted[first + 1 : first + LENGTH + 1],
        )
        for number, one in enumerate(made)
        for first in range(0, 1000, LENGTH)
        if first + LENGTH < len(one.ids)
    ]


@torch.no_grad()
def plain_tokens(directory, windows):
    """Return {depth: [(document, tokens before, nats, most likely, right)]} of counted tokens."""
    by_depth = {}
    for depth in (1, 2, 3):
        model = AutoModelForCausalLM.from_pretrained(
            directory, num_hidden_layers=depth, dtype=torch.float32
        )
        by_depth[depth] = []
        for number, read, right, counted in windows:
            logits_sv = model(torch.tensor([read])).logits[0].double()
            nats_s = cross_entropy(logits_sv, torch.tensor(right), reduction="none").tolist()
            best_s = logits_sv.argmax(-1).tolist()
            for before, count in enumerate(counted, 1):
                if count:
                    at = before - 1
                    by_depth[depth].append((number, before, nats_s[at], best_s[at], right[at]))
    return by_depth


@pytest.mark.parametrize(
    ("joined", "size", "buckets"),
    [
        (False, None, [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 24)]),
        (True, None, [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 24)]),
        (False, 7, [(1, 7), (8, 14), (15, 21), (22, 24)]),
        (True, 1, [(position, position) for position in range(1, 25)]),
    ],
)
def test_every_bucket_is_what_plain_transformers_says(
    directory, monkeypatch, joined, size, buckets
):
    made = documents()
    monkeypatch.setattr(held_out, "LOGIT_BYTES", 4 * VOCAB_SIZE * 7)  # seven tokens at a time
    positions = Positions(LENGTH, cut_positions(LENGTH, size), joined)
    assert positions.buckets == buckets
    measured = measure_by_position(load_nested_model(directory), made, positions, 60)
    windows = plain_windows(made, joined)
    assert [len(read) for _, read, _, _ in windows] == 7 * [LENGTH]
    tokens = plain_tokens(directory, windows)
    last = {place: one[3] for place, one in enumerate(tokens[3])}
    for bucket, (first, end) in zip(measured, buckets, strict=True):
        for depth in (1, 2, 3):
            inside = [
                (place, one) for place, one in enumerate(tokens[depth]) if first <= one[1] <= end
            ]
            held = bucket[depth]
            assert held.tokens_d.sum() == len(inside)
            mean = statistics.fmean(nats for _, (_, _, nats, _, _) in inside)
            assert held.loss == pytest.approx(mean, abs=1e-5)
            right = [best == wanted for _, (_, _, _, best, wanted) in inside]
            assert held.accuracy == pytest.approx(statistics.fmean(right))
            agreed = [best == last[place] for place, (_, _, _, best, _) in inside]
            assert held.agreement == pytest.approx(statistics.fmean(agreed))
    losses = {depth: [bucket[depth].loss for bucket in measured] for depth in (1, 2, 3)}
    assert losses[1] != losses[2] != losses[3]


SCALINGS = {
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "short_factor": [1.1, 1.2, 1.3, 1.4],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
        "attention_factor": 1.25,
    },
}


@pytest.mark.parametrize("kind", list(SCALINGS))
def test_scaled_positions_beyond_the_original_length_are_those_of_transformers(tmp_path, kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **SCALINGS[kind]}
    longest = 16 if kind == "dynamic" else 32
    directory = write_model(tmp_path / kind, rope_parameters=rope, max_position_embeddings=longest)
    made = documents()
    measured = measure_by_position(load_nested_model(directory), made, Positions(LENGTH, (16, 24)))
    tokens = plain_tokens(directory, plain_windows(made, False))
    for depth in (1, 2, 3):
        for bucket, inside in zip(measured, (range(1, 17), range(17, 25)), strict=True):
            nats = [one[2] for one in tokens[depth] if one[1] in inside]
            assert bucket[depth].loss == pytest.approx(statistics.fmean(nats), abs=1e-5)


def test_standard_errors_are_over_documents_or_over_joined_windows(directory):
    made = [one for one in documents() if all(one.counted[1:])]
    positions = Positions(LENGTH, (8, 24))
    measured = measure_by_position(load_nested_model(directory), made, positions)
    tokens = plain_tokens(directory, plain_windows(made, False))
    sums, counts = {}, {}
    for number, before, nats, _, _ in tokens[2]:
        if before <= 8:
            sums[number] = sums.get(number, 0.0) + nats
            counts[number] = counts.get(number, 0) + 1
    assert set(counts.values()) == {8, 16, 24}  # documents of one, two and three windows
    ratio = sum(sums.values()) / sum(counts.values())
    squares = sum((sums[number] - ratio * counts[number]) ** 2 for number in sums)
    expected = (3 / 2 * squares) ** 0.5 / sum(counts.values())
    assert measured[0][2].loss_standard_error == pytest.approx(expected, rel=1e-4)
    # of joined documents every window has the same number of tokens: the error of a mean
    measured = measure_by_position(
        load_nested_model(directory), made, Positions(LENGTH, (24,), True)
    )
    windows = plain_windows(made, True)
    held = measured[0][3]
    inner = [nats for _, _, nats, _, _ in plain_tokens(directory, windows)[3]]
    assert len(held.nats_d) == len(windows) == 6
    assert float(held.nats_d.sum()) == pytest.approx(sum(inner), rel=1e-5)


def test_a_bucket_without_counted_tokens_is_empty(directory):
    made = [EncodedDocument([1] * 25, [False] * 20 + [True] * 5)]
    measured = measure_by_position(
        load_nested_model(directory), made, Positions(LENGTH, (8, 16, 24))
    )
    assert measured[:2] == [{}, {}] and measured[2][1].tokens_d.tolist() == [5.0]


def test_one_forward_pass_gives_all_exits_and_few_logits_exist_at_a_time(directory, monkeypatch):
    monkeypatch.setattr(held_out, "LOGIT_BYTES", 4 * VOCAB_SIZE * 5)
    model = load_nested_model(directory)
    passes, rows = [], []
    model.model.model.register_forward_hook(lambda *_: passes.append(1))
    model.model.lm_head.register_forward_hook(lambda _, inputs, out: rows.append(len(out)))
    measure_by_position(model, documents(), Positions(LENGTH, (24,)), batch_tokens=48)
    assert len(passes) == 4  # seven windows, two at a time
    assert max(rows) == 5 and sum(rows) == 3 * (6 * LENGTH + 4)


def test_joined_documents_share_the_token_between_two_windows():
    made = [EncodedDocument([1, 5, 6], [False, True, True]), EncodedDocument([1, 7], [False, True])]
    assert join_documents(made, 2) == [
        EncodedDocument([1, 5, 6], [False, True, True]),
        EncodedDocument([6, 1, 7], [False, False, True]),
    ]
    assert join_documents(made, 5) == []


def test_buckets_of_powers_end_with_the_length():
    assert cut_positions(1, None) == (1,) and cut_positions(64, None) == (1, 2, 4, 8, 16, 32, 64)
    assert cut_positions(65, None)[-2:] == (64, 65) and cut_positions(6, 3) == (3, 6)


@pytest.mark.parametrize(
    ("length", "size", "message"),
    [
        (16, 17, "--position-buckets: 17 positions are more than the 16 of a window. Use fewer"),
        (1025, 4, "1025 positions in buckets of 4 are 257 rows, more than 256. Use at least 5."),
    ],
)
def test_buckets_that_do_not_suit_the_length_are_refused(length, size, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        cut_positions(length, size)


def test_a_length_that_no_text_has_is_refused(directory):
    tokenizer = open_tokenizer(directory)
    texts = [Document({"text": "the cat sat. " * number}, "text") for number in (1, 9, 3)]
    lengths = [len(tokenizer.encode(text.record["text"])) for text in texts]
    longest, total = max(lengths), sum(lengths) + 3  # a bos before each

    def check(length, joined):
        check_length("valid", texts, tokenizer, False, None, Positions(length, (length,), joined))

    check(longest, False)
    with pytest.raises(DataError, match=rf"--length: {longest + 1} tokens .* the {longest} of the"):
        check(longest + 1, False)
    check(total - 1, True)
    with pytest.raises(DataError, match=rf"--length: {total} tokens .* {total - 1} of all"):
        check(total, True)


@pytest.mark.parametrize(
    ("kind", "length", "message"),
    [
        ("yarn", 32, None),
        ("yarn", 33, "--length: 33 is more than the 32 tokens that the rotary positions of m are"),
        ("dynamic", 40, None),
        (None, 40, None),
        (None, 400, r"--length: 400 tokens are more than the \d+ of the longest document of valid"),
    ],
)
def test_lengths_are_checked_against_the_rotary_positions(tmp_path, kind, length, message):
    more = {} if kind is None else {"rope_parameters": {"rope_type": kind, **SCALINGS[kind]}}
    directory = write_model(tmp_path / "m", max_position_embeddings=16, **more)
    (directory / "model.safetensors").unlink()  # nothing of this needs weights
    values = Namespace(tokenizer=None, prompt_template=None, append_eos=False)
    texts = {"valid": [Document({"text": "t" * 150}, "text")]}
    check = lambda: check_positions(  # noqa: E731
        values,
        Positions(length, (length,)),
        [Subject("m", directory)],
        [GenerationDefaults()],
        texts,
    )
    if message is None:
        check()
    else:
        with pytest.raises(SortedError, match=message):
            check()
