"""Tokenizers of model directories, also for transformers: ids are sentencepiece's own."""

import json

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_sorted.errors import DataError
from megatron_sorted.exported.tokenizer import for_transformers, open_tokenizer, prefix_id
from tests.support.evaluated import TEXTS, write_tokenizer

PROBES = [*TEXTS, "", " ", "  two  blanks \t", "\U0001f600 größer\n\n\n- a"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_ids_and_texts_are_sentencepieces(directory):
    own = open_tokenizer(directory)
    pieces = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert own.encode_batch(PROBES) == pieces.encode(PROBES)
    assert own.encode_prompt(PROBES[0]) == [1, *pieces.encode(PROBES[0])] and prefix_id(own) == 1
    decoded = [own.decode(pieces.encode(text)) for text in PROBES]
    assert decoded == [pieces.decode(pieces.encode(text)) for text in PROBES]
    ids = [1, *pieces.encode("A bird"), 2]
    assert own.decode(ids) == "<s>A bird</s>"
    assert own.decode(ids, skip_special_tokens=True) == "A bird"
    named = open_tokenizer(directory / "none", directory / "tokenizer.model")
    assert named.encode_prompt("a") == own.encode_prompt("a")


def test_transformers_gets_the_same(directory):
    own = open_tokenizer(directory)
    made = for_transformers(own)
    texts = [*PROBES, "</s> is a token, <s> too", "<s>A</s> b"]
    assert made(texts).input_ids == [own.encode_prompt(text) for text in texts]
    assert made(texts, add_special_tokens=False).input_ids == own.encode_batch(texts)
    assert [made.decode(own.encode(text)) for text in texts] == [
        own.decode(own.encode(text)) for text in texts
    ]
    batch = made(["The bird", "The bird sang over the house"], padding=True)
    gap = len(batch.input_ids[1]) - len(own.encode("The bird")) - 1
    assert batch.attention_mask[0][: gap + 1] == [0] * gap + [1] and batch.input_ids[0][gap] == 1
    assert len(made) == own.vocab_size and made.eos_token_id == own.eos_id


def test_tokenizer_config_is_read(directory, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": False,
                "eos_token": {"content": "<s>"},
                "chat_template": "{{ messages }}",
            }
        )
    )
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode_prompt("a") == open_tokenizer(directory).encode_prompt("a")[1:]
    assert tokenizer.eos_id == 1 and tokenizer.chat_templates == {"default": "{{ messages }}"}
    made = for_transformers(tokenizer)
    assert made.chat_template == "{{ messages }}" and made("a").input_ids == tokenizer.encode("a")


def test_tokenizer_json(tmp_path):
    fast = Tokenizer(
        models.WordLevel({"[eos]": 0, "a": 1, "cat": 2, "[unk]": 3}, unk_token="[unk]")
    )
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[eos]"})
    )
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode_batch(["a cat", "cat b"]) == [[1, 2], [2, 3]]
    assert prefix_id(tokenizer) == 0
    assert for_transformers(tokenizer)(["a cat", "cat b"]).input_ids == [[1, 2], [2, 3]]


def test_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer .* --tokenizer DIRECTORY or FILE"):
        open_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"--tokenizer: .*absent: no tokenizer"):
        open_tokenizer(tmp_path, tmp_path / "absent")
    (tmp_path / "tokenizer.model").write_bytes(b"not pieces")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        open_tokenizer(tmp_path)
