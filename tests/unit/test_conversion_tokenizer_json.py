"""Fast tokenizers made of sentencepiece files: ids and texts are sentencepiece's own."""

import functools
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import SentencePieceProcessor

from megatron_sorted.conversion import tokenizer_json
from megatron_sorted.conversion.sentencepiece_file import read_sentencepiece
from megatron_sorted.conversion.tokenizer_check import TEXTS
from megatron_sorted.conversion.tokenizer_json import add_fast_tokenizer
from megatron_sorted.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_sorted.evaluation.tokenizer import encode_texts, open_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SYMBOLS = ("<|user|>", "<|u", "def ", "\n", "   ")
SETTINGS = {
    "ours": {},
    "split_digits": {"split_digits": True},
    "no_dummy_prefix": {"add_dummy_prefix": False},
    "blanks_removed": {"remove_extra_whitespaces": True, "allow_whitespace_only_pieces": False},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "nfkc_blanks_kept": {"normalization_rule_name": "nfkc", "byte_fallback": False},
    "symbols": {"user_defined_symbols": list(SYMBOLS)},
    "symbols_no_dummy_prefix": {"user_defined_symbols": list(SYMBOLS), "add_dummy_prefix": False},
    "no_bytes": {"byte_fallback": False, "character_coverage": 0.98},
    "special_tokens": {"pad_id": 3, "bos_id": 5, "eos_id": 4, "unk_id": 0, "control_symbols": ["<mask>"], "unk_piece": "[unk]"},
    "no_bos": {"bos_id": -1},
}


@functools.cache
def lines() -> list[str]:
    source = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "megatron_sorted" / "data").glob("*.py"))]
    source += [text.replace("\0", "") for text in TEXTS for _ in range(3)]
    return [line for text in source for line in text.splitlines() if line.strip()]


def train(algorithm: str, **changes) -> bytes:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines()), model_writer=stream, model_type=algorithm, **{
        "vocab_size": 1200, "hard_vocab_limit": algorithm == "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "minloglevel": 2, **changes})
    return stream.getvalue()


def texts_not_built_in() -> list[str]:
    """Returns lines of this repository, and every kind of character in random order."""
    chance = random.Random(7)
    found = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests" / "unit").glob("test_conv*.py"))[:6]]
    found += [line for text in found for line in text.splitlines()]
    signs = "ab cdeXYZ   \n\t012.,()<>|_=\"'éüßñжЖλאبनม猫カ한😀👍🏽\u200d\u00a0\u3000\u2028\x00\x07\x7f\ufeff\u2581"
    found += ["".join(chance.choices(signs, k=chance.randint(1, 40))) for _ in range(2000)]
    return [text for text in found if "<" not in text or not any(name in text for name in ("<s>", "</s>", "<unk>", "<pad>", "<mask>"))]


def same_score(data: bytes, one: list[int], other: list[int]) -> bool:
    pieces = SentencePieceProcessor(model_proto=data)
    first, second = (sum(pieces.get_score(i) for i in ids) for ids in (one, other))
    return abs(first - second) <= 1e-5 * abs(first) and pieces.decode(one) == pieces.decode(other)


@pytest.mark.parametrize(("algorithm", "name"), [
    *(("bpe", name) for name in SETTINGS), *(("unigram", name) for name in SETTINGS if name != "nfkc_blanks_kept"), ("char", "symbols")])
def test_ids_and_texts_are_sentencepieces(algorithm, name, tmp_path):
    data = train(algorithm, **SETTINGS[name])
    (tmp_path / "tokenizer.model").write_bytes(data)
    line = add_fast_tokenizer(tmp_path)
    assert line.startswith("tokenizer.json: made of tokenizer.model, the same ids and texts as sentencepiece on "), line
    pieces, fast = SentencePieceProcessor(model_proto=data), open_tokenizer(tmp_path)
    texts = [*TEXTS, *texts_not_built_in()]
    wanted, got = pieces.encode(texts), encode_texts(fast, texts)
    different = [(text, one, other) for text, one, other in zip(texts, wanted, got, strict=True) if one != other]
    if algorithm == "unigram":  # sums in single precision leave equal ways to chance
        different = [row for row in different if not same_score(data, *row[1:])]
    assert not different
    assert [fast.decode(ids) for ids in wanted] == [pieces.decode(ids) for ids in wanted]
    ids = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "pad": pieces.pad_id(), "unk": pieces.unk_id()}
    assert {key: getattr(fast, f"{key}_token_id") for key in ids} == {key: None if i < 0 else i for key, i in ids.items()}
    assert fast("a cat").input_ids == [*([ids["bos"]] if ids["bos"] >= 0 else []), *pieces.encode("a cat")]
    ours, slow = load_tokenizer("HuggingFaceTokenizer", str(tmp_path)), load_tokenizer("SentencePieceTokenizer", str(tmp_path))
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.adds_bos) == (slow.bos_id, slow.eos_id, slow.pad_id, slow.adds_bos)
    assert ours.vocab_size == slow.vocab_size == len(fast)
    assert ours.encode(TEXTS[-1]) == fast(TEXTS[-1], add_special_tokens=False).input_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]


def real_tokenizers() -> list[Path]:
    root = Path(os.environ.get("MEGATRON_SORTED_TOKENIZERS", ROOT.parent / "shared" / "data"))
    return sorted(root.glob("*/*/tokenizer.model")) if root.is_dir() else []


def test_real_tokenizers(tmp_path):
    if not real_tokenizers():
        pytest.skip("set MEGATRON_SORTED_TOKENIZERS to a directory of */*/tokenizer.model")
    for number, path in enumerate(real_tokenizers()):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "tokenizer.model").write_bytes(path.read_bytes())
        assert "the same ids" in add_fast_tokenizer(directory)
        pieces, texts = SentencePieceProcessor(model_file=str(path)), [*TEXTS, *texts_not_built_in()]
        assert encode_texts(open_tokenizer(directory), texts) == pieces.encode(texts)


@pytest.fixture
def directory(tmp_path):
    train_sentencepiece(lines(), str(tmp_path / "tokenizer.model"), 700)
    return tmp_path


def test_a_fresh_process_gets_the_right_ids(directory):
    lines_said = {}
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        (directory / family).mkdir()
        (directory / family / "config.json").write_text(json.dumps({"model_type": family, "max_position_embeddings": 77}))
        (directory / family / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
        lines_said[family] = add_fast_tokenizer(directory / family)
    assert [family for family, line in lines_said.items() if "PreTrainedTokenizerFast.from_pretrained" in line] == ["qwen2"]
    code = ("import json, sys; from transformers import AutoTokenizer, PreTrainedTokenizerFast\n"
            "texts = json.load(sys.stdin)\n"
            "for family in ('llama', 'mistral', 'qwen2', 'qwen3'):\n"
            "    tokenizer = (PreTrainedTokenizerFast if family == 'qwen2' else AutoTokenizer).from_pretrained(family)\n"
            "    print(json.dumps([family, tokenizer.model_max_length, tokenizer(texts).input_ids]))")
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(TEXTS), capture_output=True, text=True, check=True, cwd=directory,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    pieces = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    right = [[1, *ids] for ids in pieces.encode(list(TEXTS))]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[family, 77, right] for family in lines_said]
    for family in lines_said:
        assert open_tokenizer(directory / family)(list(TEXTS)).input_ids == right


def test_names_of_control_pieces_are_these_pieces_and_split_no_text_wrongly(directory):
    add_fast_tokenizer(directory)
    fast, pieces = open_tokenizer(directory), SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ids = fast("<s>one two</s><s> three", add_special_tokens=False).input_ids
    assert ids == [1, *pieces.encode("one two"), 2, 1, *pieces.encode(" three")]
    assert fast.decode([1, *pieces.encode("one two"), 2], skip_special_tokens=True) == "one two"


def test_what_a_tokenizer_config_says_stays_in_force(directory):
    said = {"add_bos_token": False, "add_eos_token": True, "eos_token": {"content": "</s>"}, "chat_template": "{{ x }}", "legacy": True,
            "tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": ["t.T", None]}, "model_max_length": 5, "pad_token": "<pad>",
            "added_tokens_decoder": {"700": {"content": "<pad>", "special": True}, "701": {"content": "<extra>", "special": False}}}
    (directory / "tokenizer_config.json").write_text(json.dumps(said))
    assert add_fast_tokenizer(directory)
    written = json.loads((directory / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and not {"legacy", "auto_map"} & written.keys()
    fast, pieces = open_tokenizer(directory), SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert fast("a b<extra>").input_ids == [*pieces.encode("a b"), 701, 2]
    assert (fast.chat_template, fast.model_max_length, fast.pad_token_id, fast.bos_token_id) == ("{{ x }}", 5, 700, 1)


def test_nothing_to_do(directory):
    (directory / "tokenizer.json").write_text("mine")
    assert add_fast_tokenizer(directory) is None and (directory / "tokenizer.json").read_text() == "mine"
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").unlink()
    assert add_fast_tokenizer(directory) is None and list(directory.iterdir()) == []


def test_what_differs_is_refused(directory, monkeypatch):
    rebuild = tokenizer_json.rebuild

    def wrong(said, data):
        from tokenizers import normalizers

        fast = rebuild(said, data)
        fast.normalizer = normalizers.Replace(" ", "\u2581")  # as transformers does: no blank before the text
        return fast

    monkeypatch.setattr(tokenizer_json, "rebuild", wrong)
    line = add_fast_tokenizer(directory)
    assert line.startswith("tokenizer.model goes alone, without tokenizer.json: ' ' is cut into")
    assert [path.name for path in directory.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize(("changes", "reason"), [
    ({"treat_whitespace_as_suffix": True}, "it writes blanks behind words"),
    ({"model_type": "word", "byte_fallback": False}, "neither of BPE nor of unigram"),
])
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
    assert add_fast_tokenizer(directory).startswith("tokenizer.model goes alone, without tokenizer.json: ")
    assert [path.name for path in directory.iterdir()] == ["tokenizer.model"]


def test_added_tokens_that_leave_a_gap_are_refused(directory):
    (directory / "added_tokens.json").write_text('{"<pad>": 705}')
    assert "'<pad>' is to be token 705, but the file and the tokens before it end at 700" in add_fast_tokenizer(directory)
    (directory / "added_tokens.json").write_text('{"<pad>": 700}')
    assert "the same ids" in add_fast_tokenizer(directory)
    assert open_tokenizer(directory).convert_tokens_to_ids("<pad>") == 700


def test_without_the_library(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = add_fast_tokenizer(directory)
    assert "tokenizers" in line and not (directory / "tokenizer.json").exists()


def test_the_file_is_read_as_protobuf_reads_it():
    from sentencepiece import sentencepiece_model_pb2

    for algorithm, name in (("bpe", "nmt_nfkc"), ("unigram", "symbols"), ("char", "special_tokens")):
        data = train(algorithm, **SETTINGS[name])
        said, theirs = read_sentencepiece(data), sentencepiece_model_pb2.ModelProto.FromString(data)
        assert [(p.text, p.score, p.kind) for p in said.pieces] == [(p.piece, p.score, p.type) for p in theirs.pieces]
        trainer, rules = theirs.trainer_spec, theirs.normalizer_spec
        assert (said.algorithm, said.byte_fallback, said.suffix_blank, said.unknown_text) == (
            trainer.model_type, trainer.byte_fallback, trainer.treat_whitespace_as_suffix, trainer.unk_surface)
        assert (said.charsmap, said.adds_blank, said.removes_blanks, said.escapes_blanks) == (
            rules.precompiled_charsmap, rules.add_dummy_prefix, rules.remove_extra_whitespaces, rules.escape_whitespaces)
