"""Documents: the counted texts and their bytes."""

import gzip
import json

import pytest

from megatron_sorted.data.preparation.encode import EncodeOptions, Encoder
from megatron_sorted.data.preparation.forms import SampleReader
from megatron_sorted.errors import DataError
from megatron_sorted.evaluation.documents import Document, encode_documents, read_documents
from megatron_sorted.exported.generation_defaults import form_of_label
from megatron_sorted.exported.tokenizer import open_tokenizer
from megatron_sorted.reading.json_lines import Block
from tests.support.evaluated import write_tokenizer


def test_plain_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(
        "One größer.\n<|endoftext|>\nTwo.\n<|endoftext|>\n \n<|endoftext|>", encoding="utf-8"
    )
    documents = read_documents(path, "<|endoftext|>")
    assert [document.record["text"] for document in documents] == ["One größer.", "Two."]
    assert [document.num_bytes for document in documents] == [13, 4]
    assert len(read_documents(path, "<|endoftext|>", limit=1)) == 1
    whole = read_documents(path)
    assert len(whole) == 1 and whole[0].record["text"] == path.read_text(
        encoding="utf-8"
    )  # nothing is dropped, not even blanks


def test_only_responses_are_counted(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    records = [
        {"instruction": "Say it.", "input": "", "output": "A cat."},
        {"text": "The bird"},
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
                {"role": "user", "content": "Ha"},
                {"role": "assistant", "content": "He"},
            ]
        },
    ]
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.write("\n".join(map(json.dumps, records)))
    documents = read_documents(path)
    assert [document.num_bytes for document in documents] == [6, 8, 4]
    tokenizer = open_tokenizer(write_tokenizer(tmp_path))
    prompt, response, text = tokenizer.encode_batch(["Say it.\n", "A cat.", "The bird"])
    first, second, third = encode_documents(documents, tokenizer)
    assert first.ids == [1, *prompt, *response] and first.counted == [False] * (1 + len(prompt)) + [
        True
    ] * len(response)
    assert second.ids == [1, *text] and second.counted == [False] + [True] * len(text)
    assert sum(third.counted) == len(tokenizer.encode_batch(["Ho"])[0]) + len(
        tokenizer.encode_batch(["He"])[0]
    )
    ended = encode_documents(documents, tokenizer, append_eos=True)
    assert ended[0].ids == [*first.ids, 2] and ended[0].counted == [*first.counted, True]
    assert sum(ended[2].counted) == sum(third.counted) + 2


def test_conversations_are_encoded_in_the_trained_form(tmp_path):
    tokenizer = open_tokenizer(write_tokenizer(tmp_path))
    record = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    }
    document = Document(record, "messages")
    for label in ("plain", "alpaca"):
        form = form_of_label(label, tokenizer)
        options = EncodeOptions(
            "SentencePieceTokenizer",
            str(tmp_path),
            None,
            "messages",
            label,
            None,
            "truncate",
            True,
            0.0,
            True,
        )
        data = Encoder(options).encode(Block("d", 1, json.dumps(record).encode())).train
        [encoded] = encode_documents(
            [document],
            tokenizer,
            append_eos=True,
            form=SampleReader("messages", label, tokenizer).form,
        )
        assert (
            encoded.ids == data.tokens.tolist()
            and sum(encoded.counted) == data.lengths[1]
            and encoded.counted[-data.lengths[1] :]
        )
        [without] = encode_documents([document], tokenizer, form=form)
        assert sum(without.counted) == sum(encoded.counted) - 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b" \n", "no text in it"),
        ("t.txt", b"a\nb\xff", "line 2: not UTF-8 at byte 3"),
        ("t.txt", b"\xff\xfea\0", "it is UTF-16"),
        ("t.jsonl", b"", "no text in it"),
        ("t.jsonl", b'{"text": "a"}\n\n{"tex": "b"}', r"t\.jsonl:3: needs a field 'text'"),
        ("t.jsonl", b"nothing", r"t\.jsonl:1: not_json"),
        ("t.jsonl", b'{"instruction": "a", "output": " "}', r"t\.jsonl:1: empty_response"),
        ("t.jsonl", b'{"text": "\\ud800"}', r"t\.jsonl:1: invalid_unicode"),
    ],
)
def test_bad_texts(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents(tmp_path / name, "###")


def test_missing_texts(tmp_path):
    for name in ("t.txt", "t.jsonl"):
        with pytest.raises(DataError, match=r"cannot be read|no such file"):
            read_documents(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.txt", lambda rows: "\n".join(map(json.dumps, rows)).encode()),
        ("t.json", lambda rows: json.dumps(rows, indent=1).encode()),
        (
            "t.gz",
            lambda rows: gzip.compress(
                b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode()
            ),
        ),
    ],
)
def test_records_are_recognised_by_content(tmp_path, name, write):
    rows = [
        {"messages": None, "text": "One\u2028more"},
        {"instruction": "I", "input": None, "output": "O", "text": None},
    ]
    (tmp_path / name).write_bytes(write(rows))
    assert [
        (document.kind, document.counted_texts)
        for document in read_documents(tmp_path / name, "###")
    ] == [("text", ["One\u2028more"]), ("instruction", ["O"])]


def test_texts_are_recognised_by_content(tmp_path):
    for name, content in (
        ("t", b'{"a": 1}\r\n###two'),
        ("t.gz", gzip.compress(b'{"a": 1}\n###two')),
    ):
        (tmp_path / name).write_bytes(content)
        assert [document.record["text"] for document in read_documents(tmp_path / name, "###")] == [
            '{"a": 1}',
            "two",
        ]
