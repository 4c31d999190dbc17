"""Files of tokenizers: what they name, and damaged or hostile ones."""

import json

import pytest

from megatron_sorted.errors import DataError
from megatron_sorted.reading import json_text
from megatron_sorted.text.tokenizer import template_files
from megatron_sorted.text.tokenizer.opening import open_tokenizer
from tests.support.tokenizer_directories import PROBES, make_directory


@pytest.fixture
def directory(tmp_path):
    return make_directory("byte_level", tmp_path / "m")


def settings(directory, **entries):
    (directory / "tokenizer_config.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"eos_token": 5}, "eos_token: 5 is not a token"),
        ({"eos_token": {"content": 1}}, "is not a token"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: not an object"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "'x' is not an id"),
        ({"added_tokens_decoder": {"-1": {"content": "a"}}}, "'-1' is not an id"),
        (
            {"added_tokens_decoder": {"405": {"content": "<a>"}}},
            "'<a>' should be token 405, .* make it 400",
        ),
        (
            {"added_tokens_decoder": {"7": {"content": "<|end|>"}}},
            r"'<\|end\|>' should be token 7, .* make it 1",
        ),
        ({"chat_template": 5}, "chat_template: neither a text nor a list"),
        ({"chat_template": [{"name": "a"}]}, "chat_template: neither a text nor a list"),
        (
            {"chat_template": "x" * (template_files.MAX_TEMPLATE_BYTES + 1)},
            "at most 1,048,576 are read",
        ),
    ],
)
def test_invalid_settings(directory, entries, message):
    settings(directory, **entries)
    with pytest.raises(DataError, match=f"--tokenizer-model: .*{message}"):
        open_tokenizer(directory)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
        b'{"version": "1.0", "model": {"type": "None"}}',
    ],
)
def test_damaged_vocabularies(directory, content):
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        open_tokenizer(directory)


@pytest.mark.parametrize(
    "name",
    ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"],
)
@pytest.mark.parametrize("content", [b"{", b"[1]", b"[" * 100_000])
def test_damaged_settings(directory, name, content):
    (directory / name).write_bytes(content)
    with pytest.raises(
        DataError,
        match=rf"{name}: (not JSON|not a JSON object|its lists .* nested more than 100 deep)",
    ):
        open_tokenizer(directory)


def test_files_that_are_too_large(directory, monkeypatch):
    monkeypatch.setattr(json_text.read_bounded, "__defaults__", (json_text.REMEDY, DataError, 100))
    with pytest.raises(
        DataError, match=r"tokenizer\.json: more than 100 bytes, the limit for such a file"
    ):
        open_tokenizer(directory)


def test_templates_that_are_not_text_or_too_large(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja: not UTF-8 at byte 0"):
        open_tokenizer(directory)
    (directory / "chat_template.jinja").write_bytes(b"x" * (template_files.MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(DataError, match=r"chat_template\.jinja: more than 1,048,576 bytes"):
        open_tokenizer(directory)


def test_nothing_in_the_directory_is_executed(directory):
    settings(
        directory,
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        eos_token="<|end|>",
    )
    (directory / "evil.py").write_text("raise SystemExit('executed')")
    assert open_tokenizer(directory).encode("a b")


def test_added_tokens_of_either_file(directory):
    plain = open_tokenizer(directory)
    (directory / "added_tokens.json").write_text(json.dumps({"<b>": 401, "<a>": 400}))
    tokenizer = open_tokenizer(directory)
    assert tokenizer.encode("x<a><b>") == [*plain.encode("x"), 400, 401]
    settings(directory, added_tokens_decoder={"400": {"content": "<c>", "special": True}})
    tokenizer = open_tokenizer(directory)
    assert (
        tokenizer.encode("<c>") == [400]
        and 400 in tokenizer.special_ids
        and len(tokenizer.encode("<a>")) > 1
    )


def test_contradicting_names_of_a_special_token(directory):
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|pad|>"}))
    tokenizer = open_tokenizer(directory)
    assert tokenizer.eos_id == 2
    assert (
        "eos_token is '<|end|>' in tokenizer_config.json, '<|pad|>' in special_tokens_map.json; "
        "'<|pad|>' is used"
    ) in tokenizer.notes[0]


def test_pairs_without_a_known_class_are_refused(tmp_path):
    directory = make_directory("gpt2_files", tmp_path)
    assert open_tokenizer(directory).encode_batch(list(PROBES))
    settings(directory, tokenizer_class="OtherTokenizer")
    with pytest.raises(
        DataError,
        match=r"vocab\.json and merges\.txt do not define how texts are split, "
        r".*Name one of LlamaTokenizer",
    ):
        open_tokenizer(directory)
    settings(directory, tokenizer_class="GPT2Tokenizer")
    (directory / "merges.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"vocab\.json and merges\.txt are not a tokenizer"):
        open_tokenizer(directory)


def test_no_tokenizer(tmp_path):
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.model"):
        with pytest.raises(
            DataError,
            match=r"--tokenizer-model: .*: no tokenizer \(tokenizer\.json, tokenizer\.model, "
            r"or vocab\.json",
        ):
            open_tokenizer(path)


@pytest.mark.parametrize("number", [[1], {"a": 1}, True, "²", 1.0, "9" * 30])
def test_invalid_ids(directory, number):
    (directory / "added_tokens.json").write_text(json.dumps({"<b>": number}))
    with pytest.raises(DataError, match=r"added_tokens\.json: .* is not an id"):
        open_tokenizer(directory)


def test_pieces_that_are_not_text(tmp_path):
    directory = make_directory("pieces_bpe", tmp_path)
    data = (directory / "tokenizer.model").read_bytes()
    (directory / "tokenizer.model").write_bytes(data.replace(b"<unk>", b"\x80unk>", 1))
    with pytest.raises(DataError, match=r"tokenizer\.model: not a sentencepiece model"):
        open_tokenizer(directory)
