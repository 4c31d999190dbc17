"""Fast tokenizers from sentencepiece files: ids and texts are sentencepiece's own."""

import json
import sys

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import AutoTokenizer

from megatron_sorted.conversion.tokenizers import export
from megatron_sorted.conversion.tokenizers.export import add_fast_tokenizer
from megatron_sorted.conversion.tokenizers.sentencepiece_file import read_sentencepiece
from megatron_sorted.data.preparation.train_tokenizer import train_sentencepiece
from megatron_sorted.exported.tokenizer import open_tokenizer
from tests.support.sentencepiece_files import SETTINGS, check_tokenizer, lines, train


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("bpe", "ours"),
        ("bpe", "symbols"),
        ("bpe", "blanks_removed"),
        ("unigram", "ours"),
        ("char", "symbols"),
    ],
)
def test_ids_and_texts_are_sentencepieces(algorithm, name, tmp_path):
    check_tokenizer(
        algorithm, name, tmp_path
    )  # the other settings: tests/system/test_fast_tokenizers.py


@pytest.fixture
def directory(tmp_path):
    train_sentencepiece(lines, str(tmp_path / "tokenizer.model"), 700)
    return tmp_path


def test_names_of_control_pieces_are_encoded_as_these_pieces(directory):
    add_fast_tokenizer(directory)
    fast, pieces = (
        open_tokenizer(directory),
        SentencePieceProcessor(model_file=str(directory / "tokenizer.model")),
    )
    ids = AutoTokenizer.from_pretrained(directory)(
        "<s>one two</s><s> three\none", add_special_tokens=False
    ).input_ids
    proto = sentencepiece_model_pb2.ModelProto.FromString(
        (directory / "tokenizer.model").read_bytes()
    )
    proto.normalizer_spec.add_dummy_prefix = False
    bare = SentencePieceProcessor(model_proto=proto.SerializeToString())
    assert (
        ids
        == [1, *bare.encode("one two"), 2, 1, *bare.encode(" three\none")]
        == fast.encode("<s>one two</s><s> three\none")
    )
    assert fast.decode([1, *pieces.encode("one two"), 2], skip_special_tokens=True) == "one two"


def test_the_options_of_a_tokenizer_config_are_kept(directory):
    config = {
        "add_bos_token": False,
        "add_eos_token": True,
        "eos_token": {"content": "</s>"},
        "chat_template": "{{ x }}",
        "legacy": True,
        "tokenizer_class": "LlamaTokenizer",
        "auto_map": {"AutoTokenizer": ["t.T", None]},
        "model_max_length": 5,
        "pad_token": "<pad>",
        "added_tokens_decoder": {
            "700": {"content": "<pad>", "special": True},
            "701": {"content": "<extra>", "special": False},
        },
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert add_fast_tokenizer(directory)
    written = json.loads((directory / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in written
    fast, pieces = (
        AutoTokenizer.from_pretrained(directory),
        SentencePieceProcessor(model_file=str(directory / "tokenizer.model")),
    )
    assert fast("a b<extra>c").input_ids == [*pieces.encode("a b"), 701, *pieces.encode("c"), 2]
    ours = open_tokenizer(directory)
    assert ours.encode("a b<extra>c") == [*pieces.encode("a b"), 701, *pieces.encode("c")]
    assert (ours.adds_bos, ours.adds_eos, ours.pad_id, ours.chat_templates) == (
        False,
        True,
        700,
        {"default": "{{ x }}"},
    )
    assert (fast.chat_template, fast.model_max_length, fast.pad_token_id, fast.bos_token_id) == (
        "{{ x }}",
        5,
        700,
        1,
    )


def test_other_directories_are_left_unchanged(directory):
    (directory / "tokenizer.json").write_text("mine")
    assert (
        add_fast_tokenizer(directory) is None
        and (directory / "tokenizer.json").read_text() == "mine"
    )
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").unlink()
    assert add_fast_tokenizer(directory) is None and list(directory.iterdir()) == []


def test_a_tokenizer_that_differs_is_refused(directory, monkeypatch):
    rebuild = export.rebuild

    def wrong(file, data, space_before):
        from tokenizers import normalizers

        fast = rebuild(file, data, "always")
        fast.normalizer = normalizers.Replace(
            " ", "\u2581"
        )  # as transformers does: no blank before the text
        return fast

    monkeypatch.setattr(export, "rebuild", wrong)
    line = add_fast_tokenizer(directory)
    assert line.startswith("tokenizer.model is exported without tokenizer.json: ' ' is split into")
    assert [path.name for path in directory.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"treat_whitespace_as_suffix": True}, "it writes blanks behind words"),
        ({"model_type": "word", "byte_fallback": False}, "neither BPE nor unigram"),
    ],
)
def test_kinds_that_cannot_be_rebuilt(tmp_path, changes, reason):
    changes = dict(changes)
    data = train(changes.pop("model_type", "bpe"), **changes)
    (tmp_path / "tokenizer.model").write_bytes(data)
    line = add_fast_tokenizer(tmp_path)
    assert reason in line and [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize("content", [b"", b"\0", b"not a model at all", None])
def test_damaged_files(directory, content):
    path = directory / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    assert add_fast_tokenizer(directory).startswith(
        "tokenizer.model is exported without tokenizer.json: "
    )
    assert [path.name for path in directory.iterdir()] == ["tokenizer.model"]


def test_added_tokens_that_leave_a_gap_are_refused(directory):
    (directory / "added_tokens.json").write_text('{"<pad>": 705}')
    assert (
        "'<pad>' should be token 705, but the vocabulary of tokenizer.model and the tokens before "
        "it make it 700" in add_fast_tokenizer(directory)
    )
    (directory / "added_tokens.json").write_text('{"<pad>": 700}')
    assert "the same ids" in add_fast_tokenizer(directory)
    assert open_tokenizer(directory).encode("<pad>") == [700]


def test_without_the_library(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = add_fast_tokenizer(directory)
    assert "tokenizers" in line and not (directory / "tokenizer.json").exists()


def test_the_parser_agrees_with_protobuf():
    for algorithm, name in (
        ("bpe", "nmt_nfkc"),
        ("unigram", "symbols"),
        ("char", "special_tokens"),
    ):
        data = train(algorithm, **SETTINGS[name])
        file, theirs = read_sentencepiece(data), sentencepiece_model_pb2.ModelProto.FromString(data)
        assert [(p.text, p.score, p.kind) for p in file.pieces] == [
            (p.piece, p.score, p.type) for p in theirs.pieces
        ]
        trainer, rules = theirs.trainer_spec, theirs.normalizer_spec
        assert (file.algorithm, file.byte_fallback, file.suffix_blank, file.unknown_text) == (
            trainer.model_type,
            trainer.byte_fallback,
            trainer.treat_whitespace_as_suffix,
            trainer.unk_surface,
        )
        assert (file.charsmap, file.adds_blank, file.removes_blanks, file.escapes_blanks) == (
            rules.precompiled_charsmap,
            rules.add_dummy_prefix,
            rules.remove_extra_whitespaces,
            rules.escape_whitespaces,
        )
