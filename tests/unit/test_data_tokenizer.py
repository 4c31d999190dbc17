"""Tokenizers: round trips, special tokens, damaged files."""

import hashlib
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, pre_tokenizers, processors

from megatron_sorted.data.preparation.train_tokenizer import train_sentencepiece
from megatron_sorted.data.tokenizer import load_tokenizer
from megatron_sorted.errors import DataError

TEXTS = [
    f"The {color} {animal} sees {count} {animal}s.\n\tЛифт, größer, 猫が好き"
    for color in ("red", "green", "blue")
    for animal in ("fox", "dog", "hen")
    for count in range(20)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(lambda: TEXTS, str(path), 380)
    return path


@pytest.fixture
def directory(tmp_path):
    """Return a Hugging Face directory with three words and two special tokens."""
    fast = HuggingFaceTokenizer(
        models.WordLevel(
            {"<s>": 0, "</s>": 1, "?": 2, "one": 3, "two": 4, "three": 5}, unk_token="?"
        )
    )
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast.enable_truncation(max_length=2)
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    )
    return tmp_path


def test_sentencepiece_keeps_every_character(model):
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(model))
    assert tokenizer.vocab_size == 380
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.adds_bos) == (
        1,
        2,
        2,
        True,
    )
    for text in ("The red fox", "two  spaces\n\n\tand tabs ", "never seen: ЖЩ 漢字 🦊 \u0000 é"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == [] and tokenizer.encode_batch(["fox", "hen"]) == [
        tokenizer.encode("fox"),
        tokenizer.encode("hen"),
    ]
    assert (
        tokenizer.name == "tokenizer.model"
        and tokenizer.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    )


def test_training_is_repeatable(model, tmp_path):
    train_sentencepiece(lambda: iter(TEXTS), str(tmp_path / "again.model"), 380)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()
    unigram = train_sentencepiece(
        lambda: TEXTS, str(tmp_path / "unigram.model"), 300, model_type="unigram"
    )
    assert (
        unigram.vocab_size == 300 and unigram.decode(unigram.encode("blue hen 🦊")) == "blue hen 🦊"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.model", "unigram.model"]


def test_more_characters_than_pieces_are_written_as_bytes(tmp_path):
    letters = [chr(0x4E00 + number) for number in range(900)]
    texts = [
        "the fox and the hen " * 20 + "".join(letters[number:] or letters)
        for number in range(0, 900, 3)
    ]
    tokenizer = train_sentencepiece(lambda: texts, str(tmp_path / "m.model"), 500)
    assert tokenizer.vocab_size == 500 and tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert len(tokenizer.encode("the fox and the hen")) < 8, "pieces are left for words"
    assert (
        len(tokenizer.encode(letters[-1])) == 2 and len(tokenizer.encode("犬")) == 4
    )  # a space before each; a known one, three bytes


def test_vocabulary_too_large_for_the_texts(tmp_path):
    with pytest.raises(DataError, match=r"--train-tokenizer 5000: .*Choose another"):
        train_sentencepiece(lambda: TEXTS[:3], str(tmp_path / "m.model"), 5000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1, 60, 260])
def test_vocabulary_too_small_for_bytes(size, tmp_path):
    with pytest.raises(
        DataError, match=f"--train-tokenizer {size}: .* alone are 259, .* Give more."
    ):
        train_sentencepiece(lambda: TEXTS, str(tmp_path / "m.model"), size)


def test_hugging_face_directory(directory):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(directory))
    assert tokenizer.encode("one two three four") == [
        3,
        4,
        5,
        2,
    ]  # neither cut to 2 nor given a bos
    assert (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.adds_bos,
    ) == (6, 0, 1, 1, True)
    assert tokenizer.decode([3, 5]) == "one three"


def test_hugging_face_special_tokens_map_and_none(directory):
    (directory / "tokenizer_config.json").unlink()
    assert load_tokenizer("HuggingFaceTokenizer", str(directory)).eos_id is None
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "</s>", "pad_token": "?"})
    )
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(directory))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.adds_bos) == (
        None,
        1,
        2,
        False,
    )


def test_directory_with_only_a_sentencepiece_model(model):
    assert load_tokenizer("HuggingFaceTokenizer", str(model.parent)).encode(
        "fox"
    ) == load_tokenizer("SentencePieceTokenizer", str(model)).encode("fox")


def test_nothing_in_the_directory_is_executed(directory):
    (directory / "tokenization_custom.py").write_text("raise SystemExit('executed')")
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_custom.Custom", None]},
        "tokenizer_class": "Custom",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer("HuggingFaceTokenizer", str(directory)).encode("two") == [4]


def test_null_tokenizer():
    tokenizer = load_tokenizer("NullTokenizer", None, 10)
    assert (
        tokenizer.encode("3 1  9") == [3, 1, 9]
        and tokenizer.decode([3, 1]) == "3 1"
        and tokenizer.eos_id == 9
    )
    with pytest.raises(DataError, match=r"10 is not one of 0..9"):
        tokenizer.encode("10")
    with pytest.raises(DataError, match="numbers only"):
        tokenizer.encode("a")
    with pytest.raises(DataError, match="Give --vocab-size"):
        load_tokenizer("NullTokenizer", None)


@pytest.mark.parametrize("content", [b"", b"\0", b"not a model at all", None])
def test_damaged_sentencepiece(model, tmp_path, content):
    path = tmp_path / "bad.model"
    path.write_bytes(model.read_bytes()[:300] if content is None else content)
    with pytest.raises(DataError, match=r"--tokenizer-model: .*bad\.model"):
        load_tokenizer("SentencePieceTokenizer", str(path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_directory(directory, name):
    (directory / name).write_bytes((directory / name).read_bytes()[:-3])
    with pytest.raises(DataError, match=name):
        load_tokenizer("HuggingFaceTokenizer", str(directory))


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("SentencePieceTokenizer", None, "needs --tokenizer-model"),
        (
            "SentencePieceTokenizer",
            "absent.model",
            r"--tokenizer-model: absent\.model: no tokenizer",
        ),
        ("HuggingFaceTokenizer", "absent", r"--tokenizer-model: absent: no tokenizer"),
        ("Other", str(Path(__file__)), "--tokenizer-type: Other is unknown"),
    ],
)
def test_missing(kind, model, message):
    with pytest.raises(DataError, match=message):
        load_tokenizer(kind, model)


def test_only_line_feeds_end_the_lines_that_are_trained_on(tmp_path):
    texts = [f"{text}\u2028next\x0bone" for text in TEXTS]
    tokenizer = train_sentencepiece(lambda: texts, str(tmp_path / "t.model"), 380)
    assert {"\u2028", "\x0b"} <= {
        letter for piece in tokenizer.vocabulary() for letter in piece
    }  # not written as bytes
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
