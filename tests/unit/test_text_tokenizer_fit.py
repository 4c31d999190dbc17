"""A tokenizer with more tokens than the model has rows: unused ones do no harm."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer

from megatron_sorted.errors import DataError
from megatron_sorted.text.tokenizer.contract import NullTokenizer
from megatron_sorted.text.tokenizer.fit import check_ids, fitting_pad, surplus_line
from megatron_sorted.text.tokenizer.opening import open_tokenizer
from tests.support.tokenizer_directories import byte_level, make_directory


@pytest.fixture
def directory(tmp_path):
    """Return a directory of 400 tokens and an added [PAD]."""
    make_directory("byte_level", tmp_path)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.add_special_tokens([AddedToken("[PAD]", special=True)])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_an_added_token_needs_no_row(directory):
    tokenizer = open_tokenizer(directory)
    assert (tokenizer.vocab_size, tokenizer.text_size) == (401, 400)
    line = surplus_line(tokenizer, 400, "model")
    assert "vocabulary of 400; added tokens '[PAD]' (400) have no row" in line
    assert surplus_line(tokenizer, 401, "model") is None
    check_ids([tokenizer.encode("a b")], tokenizer, 400, "x")
    with pytest.raises(
        DataError, match=r"x: text 2 holds '\[PAD\]', token 400, for which the model has no row"
    ):
        check_ids([[1], tokenizer.encode("a [PAD]")], tokenizer, 400, "x")


def test_a_pad_without_a_row_is_not_used(directory):
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "[PAD]"}))
    tokenizer = open_tokenizer(directory)
    assert tokenizer.pad_id == 400 and fitting_pad(tokenizer, 400) == tokenizer.eos_id
    assert fitting_pad(tokenizer, 401) == 400


def test_a_named_token_that_no_file_holds_is_added_as_in_transformers(tmp_path):
    make_directory("byte_level", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "pad_token": "<new>"})
    )
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.pad_id == 400 and "'<new>' (400)" in surplus_line(tokenizer, 400, "model")


def test_an_entry_that_no_text_contains_needs_no_row(tmp_path):
    content = json.loads(byte_level().to_str())
    content["model"]["vocab"]["[unreached]"] = 400
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.text_size) == (401, 400)
    assert "'[unreached]' (400)" in surplus_line(tokenizer, 400, "model")


def test_a_sentencepiece_file_with_added_tokens(tmp_path):
    tokenizer = open_tokenizer(make_directory("pieces_chat", tmp_path))
    line = surplus_line(tokenizer, tokenizer.vocab_size - 2, "model")
    assert "'<|im_start|>'" in line and "'<|im_end|>'" in line


@pytest.mark.parametrize("rows", [100, 399])
def test_texts_that_need_more_rows_are_refused(directory, rows):
    with pytest.raises(
        DataError,
        match=(
            f"model: the model has a vocabulary of {rows}, but texts of .* up to 399.*Give the "
            "model's own"
        ),
    ):
        surplus_line(open_tokenizer(directory), rows, "model")
    with pytest.raises(DataError, match="up to 9"):
        surplus_line(NullTokenizer(10), 9, "model")


def test_an_end_of_text_without_a_row_is_refused(directory):
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[PAD]"}))
    with pytest.raises(DataError, match="up to 400"):
        surplus_line(open_tokenizer(directory), 400, "model")
