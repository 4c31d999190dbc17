"""Greedy answers in batches, against one prompt at a time with an argmax loop."""

import pytest
import torch

from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.closed_book import (
    Answered,
    Answering,
    answer_questions,
    decode_greedily,
    encode_prompts,
)
from megatron_sorted.evaluation.decoded import decoding_network
from megatron_sorted.evaluation.nested_model import load_nested_model
from megatron_sorted.evaluation.questions import Question
from megatron_sorted.exported.tokenizer import open_tokenizer
from tests.support.decoding import needs_native
from tests.support.evaluated import TEXTS, write_model, write_tokenizer

PROMPTS = ["Once", *TEXTS, "The cat", "A", "A bird flew and the dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_nested_model(
        write_model(tmp_path_factory.mktemp("model") / "m", max_position_embeddings=128)
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return open_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@torch.no_grad()
def one_by_one(sub, ids, ends, max_new_tokens):
    new = []
    while len(new) < max_new_tokens and not (new and new[-1] in ends):
        new.append(int(sub(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("depth", [1, 3])
def test_batches_give_the_texts_of_single_prompts(model, tokenizer, depth):
    prompts, num_cut = encode_prompts(PROMPTS, tokenizer, 128 - 12)
    assert num_cut == 0 and all(ids[0] == 1 for ids in prompts)
    sub, ends = model.sub_model(depth), Answering(tokenizer, 12).stop_ids
    expected = [
        tokenizer.decode(one_by_one(sub, ids, ends, 12), skip_special_tokens=True)
        for ids in prompts
    ]
    for batch_size in (1, 3, 16):
        assert decode_greedily(sub, prompts, Answering(tokenizer, 12, batch_size)) == expected
    assert len(set(expected)) > 3


def test_an_answer_ends_at_a_line_break(model, tokenizer):
    ends = Answering(tokenizer, 12).stop_ids
    breaks = tokenizer.vocabulary()["<0x0A>"]
    assert (
        breaks in ends
        and 2 in ends
        and all("\n" in tokenizer.decode([token]) for token in ends if token != 2)
    )
    sub = model.sub_model(3)
    prompts, _ = encode_prompts(PROMPTS, tokenizer, 50)
    with torch.no_grad():
        bias = torch.zeros(model.model.config.vocab_size)
        bias[breaks] = 1e4
        sub.lm_head = torch.nn.Linear(32, len(bias))
        sub.lm_head.weight.zero_()
        sub.lm_head.bias.copy_(bias)
    assert decode_greedily(sub, prompts, Answering(tokenizer, 8)) == ["\n"] * len(PROMPTS)


def test_scores_of_known_answers(model, tokenizer):
    prompts, _ = encode_prompts(PROMPTS[:2], tokenizer, 52)
    texts = decode_greedily(model.sub_model(2), prompts, Answering(tokenizer, 5))
    first = texts[0].split("\n")[0].strip()
    questions = [Question("a", first, (first,)), Question("b", "no", ("no such words",))]
    answered = answer_questions(model, 2, questions, prompts, Answering(tokenizer, 5))
    assert answered.answers[0] == first and answered.mean("exact_match_with_case") == 0.5
    scores = Answered([], {"f1": [0.0, 1.0, 0.5, 0.5]})
    assert scores.mean("f1") == 0.5 and scores.standard_error("f1") == pytest.approx(
        (0.5 / 3) ** 0.5 / 2
    )


def test_long_prompts_lose_their_beginning(tokenizer):
    whole, _ = encode_prompts(PROMPTS[1:2], tokenizer, 10**6)
    cut, num_cut = encode_prompts(PROMPTS[1:2], tokenizer, 10)
    assert num_cut == 1 and cut[0] == [1, *whole[0][-9:]]
    with pytest.raises(SettingsError, match="leaves 0 tokens"):
        encode_prompts(PROMPTS, tokenizer, 0)


@needs_native
@pytest.mark.parametrize("depth", [1, 3])
def test_the_decoder_answers_as_transformers_does(model, tokenizer, depth):
    network = decoding_network(model, "on")
    assert network.is_native and network.kind == "float32"
    prompts, _ = encode_prompts(PROMPTS, tokenizer, 128 - 12)
    questions = [Question(text, "a", ("a",)) for text in PROMPTS]
    for batch_size in (1, 3):
        how = Answering(tokenizer, 12, batch_size)
        wanted = answer_questions(model, depth, questions, prompts, how)
        got = answer_questions(model, depth, questions, prompts, how, None, network)
        assert got == wanted and len(set(got.answers)) > 3
    assert model.model.lm_head.weight.numel(), "the model is measured further"


@needs_native
def test_transformers_answers_where_the_decoder_cannot(model, monkeypatch, capsys):
    assert decoding_network(model, "off") is None and not capsys.readouterr().err
    monkeypatch.setattr("megatron_sorted.decoding.native.choice._reported", set())
    monkeypatch.setattr("megatron_sorted.evaluation.decoded.free_host_bytes", lambda: 1000)
    with pytest.raises(SettingsError, match=r"--native on: packed copies .* 0\.00 GB are free"):
        decoding_network(model, "on")
    for _ in range(2):
        assert decoding_network(model) is None
    err = capsys.readouterr().err
    assert err.count("transformers generates the answers") == 1 and "packed copies" in err
