"""Tokenizers of model directories: the ids are sentencepiece's own."""

import json

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_sorted.errors import DataError
from megatron_sorted.exported.tokenizer import encode_texts, open_tokenizer, prefix_id
from tests.support.evaluated import TEXTS, write_tokenizer

PROBES = [*TEXTS, "", " ", "  two  blanks \t", "</s> is text, <s> too", "\U0001f600 größer\n\n\n- a"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_ids_and_texts_are_sentencepieces(directory):
    own, pieces = open_tokenizer(directory), SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert encode_texts(own, PROBES) == pieces.encode(PROBES)
    assert own(PROBES[0]).input_ids == [1, *pieces.encode(PROBES[0])] and prefix_id(own) == 1
    assert [own.decode(pieces.encode(text)) for text in PROBES] == [pieces.decode(pieces.encode(text)) for text in PROBES]
    ids = [1, *pieces.encode("A bird"), 2]
    assert own.decode(ids) == "<s>A bird</s>" and own.decode(ids, skip_special_tokens=True) == "A bird"
    batch = own(["The bird", "The bird sang over the house"], padding=True)
    gap = len(batch.input_ids[1]) - len(pieces.encode("The bird")) - 1
    assert batch.attention_mask[0][:gap + 1] == [0] * gap + [1] and batch.input_ids[0][gap] == 1
    assert open_tokenizer(directory / "none", directory / "tokenizer.model")("a").input_ids == own("a").input_ids


def test_tokenizer_config_is_heard(directory, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "eos_token": {"content": "<s>"},
                                                                "chat_template": "{{ messages }}"}))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer("a").input_ids == open_tokenizer(directory)("a").input_ids[1:]
    assert tokenizer.eos_token_id == 1 and tokenizer.chat_template == "{{ messages }}"


def test_tokenizer_json_is_read_by_transformers(tmp_path):
    fast = Tokenizer(models.WordLevel({"[eos]": 0, "a": 1, "cat": 2, "[unk]": 3}, unk_token="[unk]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[eos]"}))
    tokenizer = open_tokenizer(tmp_path)
    assert encode_texts(tokenizer, ["a cat", "cat b"]) == [[1, 2], [2, 3]] and prefix_id(tokenizer) == 0


def test_no_tokenizer(tmp_path, directory):
    with pytest.raises(DataError, match=r"no tokenizer .* Give --tokenizer DIRECTORY or FILE"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not pieces")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="the tokenizer cannot be read"):
        open_tokenizer(tmp_path)
