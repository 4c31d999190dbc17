"""Lines of JSON as documents: templates, formats, broken lines, truncation.

The tokenizer has one id per character.
"""

import json

import numpy as np
import pytest

from megatron_sorted.data.indexed import open_indexed
from megatron_sorted.data.preparation.encode import EncodeOptions, Encoder, Skipped
from megatron_sorted.data.preparation.prepare import PrepareOptions, prepare
from megatron_sorted.data.preparation.templates import conversation_of, detect_format
from megatron_sorted.data.tokenizer import Tokenizer
from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_lines import Block

BOS, EOS = 1, 2


class Letters(Tokenizer):
    """A tokenizer with one id per character: its code point; 1 is bos, 2 eos."""

    vocab_size, bos_id, eos_id, pad_id, adds_bos, name, sha256 = (
        1 << 16,
        BOS,
        EOS,
        EOS,
        True,
        "letters",
        "",
    )
    special_tokens, special_ids, chat_templates = (
        {"bos_token": chr(BOS), "eos_token": chr(EOS)},
        frozenset((BOS, EOS)),
        {},
    )

    def encode_batch(self, texts):
        return [[ord(letter) for letter in text] for text in texts]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i) if i > 2 else "" for i in ids)

    def token_text(self, token):
        return chr(token)

    def vocabulary(self):
        return {chr(i): i for i in range(self.vocab_size)}


def run(lines, first_line=1, tokenizer=None, **options):
    defaults = {
        "tokenizer_type": "",
        "tokenizer_model": None,
        "vocab_size": None,
        "data_format": "instruction",
        "prompt_template": "plain",
        "seq_length": None,
        "too_long": "truncate",
        "append_eod": True,
        "valid_fraction": 0.0,
        "strict": False,
    }
    data = b"\n".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
    )
    return Encoder(EncodeOptions(**{**defaults, **options}), tokenizer or Letters()).encode(
        Block("dir/some.jsonl", first_line, data)
    )


def listed(documents):
    """Return documents as lists of (text with ^ for bos and $ for eos, mode)."""
    text = "".join({BOS: "^", EOS: "$"}.get(int(t), chr(t)) for t in documents.tokens)
    ends = np.cumsum(documents.lengths)
    sequences = [
        (text[end - length : end], int(mode))
        for end, length, mode in zip(ends, documents.lengths, documents.modes, strict=True)
    ]
    result, at = [], 0
    for count in documents.num_sequences:
        result.append(sequences[at : at + count])
        at += count
    return result


def test_instruction():
    encoded = run(
        [
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {"instruction": "Hi", "input": "", "output": "Yo"},
            {"instruction": "Hi", "output": "猫"},
            {"instruction": "Hi", "input": None, "output": "é"},
        ]
    )
    assert listed(encoded.train) == [
        [("^Add\n1 2\n", 0), ("3$", 1)],
        [("^Hi\n", 0), ("Yo$", 1)],
        [("^Hi\n", 0), ("猫$", 1)],
        [("^Hi\n", 0), ("é$", 1)],
    ]
    assert (
        encoded.num_samples == 4 and encoded.skipped == Skipped() and encoded.valid.tokens.size == 0
    )


def test_messages_train_on_every_answer():
    turns = [
        ("system", "Be brief"),
        ("user", "A?"),
        ("assistant", "a"),
        ("user", "B?"),
        ("assistant", "b"),
        ("user", "C?"),
    ]
    encoded = run(
        [
            {"messages": [{"role": role, "content": content} for role, content in turns]},
            {"messages": [{"role": "assistant", "content": "first"}]},
        ],
        data_format="messages",
    )
    assert listed(encoded.train) == [
        [("^Be brief\nA?\n", 0), ("a$", 1), ("B?\n", 0), ("b$", 1)],
        [("^first$", 1)],
    ]


def test_text_is_one_sequence_and_never_truncated():
    encoded = run([{"text": "One\ntwo"}, {"text": "x" * 50}], data_format="text", seq_length=8)
    assert (
        listed(encoded.train) == [[("^One\ntwo$", 1)], [("^" + "x" * 50 + "$", 1)]]
        and encoded.num_truncated == 0
    )
    assert listed(run([{"text": "a"}], data_format="text", append_eod=False).train) == [[("^a", 1)]]


def test_alpaca():
    opening, with_input = (
        prompt
        for document in listed(
            run(
                [
                    {"instruction": "Hi", "output": "A"},
                    {"instruction": "Add", "input": "1 2", "output": "3"},
                ],
                prompt_template="alpaca",
            ).train
        )
        for prompt, mode in document
        if not mode
    )
    assert with_input.startswith(
        "^Below is an instruction that describes a task, paired with an input"
    )
    assert with_input.endswith(".\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n")
    assert opening.endswith("request.\n\n### Instruction:\nHi\n\n### Response:\n")
    messages = [
        {"role": role, "content": content}
        for role, content in (("system", "S"), ("user", "Q"), ("assistant", "A"))
    ]
    result = listed(
        run([{"messages": messages}], data_format="messages", prompt_template="alpaca").train
    )
    assert result == [[("^S\n\n### Instruction:\nQ\n\n### Response:\n", 0), ("A$", 1)]]


def test_broken_lines_are_counted_with_their_numbers():
    good = {"instruction": "Q", "output": "A"}
    lines = [
        good,
        b"{not json",
        b"",
        b"   ",
        b'{"instruction": "\xff", "output": "x"}',
        [1],
        b"3",
        {"instruction": "Q"},
        {"output": "A"},
        {"instruction": 5, "output": "A"},
        {"instruction": "Q", "output": ["A"]},
        {"instruction": "Q", "output": " \n"},
        {"instruction": "", "input": "", "output": "A"},
        b'{"instruction": "\\ud800", "output": "A"}',
        b"[" * 100_000,
        good,
    ]
    encoded = run(lines, first_line=101)
    assert len(encoded.train.num_sequences) == 2 and encoded.num_samples == 14
    assert encoded.skipped.count == {
        "not_json": 1,
        "nested_too_deep": 1,
        "not_utf8": 1,
        "not_an_object": 2,
        "missing_field": 2,
        "wrong_type": 2,
        "empty_response": 1,
        "empty_instruction": 1,
        "invalid_unicode": 1,
    }
    assert encoded.skipped.where["not_json"] == ["some.jsonl:102"] and encoded.skipped.where[
        "nested_too_deep"
    ] == ["some.jsonl:115"]
    assert encoded.skipped.where["empty_response"] == ["some.jsonl:112"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "missing_field"),
        ({"messages": "x"}, "wrong_type"),
        ({"messages": ["x"]}, "wrong_type"),
        ({"messages": []}, "no_assistant_turn"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no_assistant_turn"),
        ({"messages": [{"role": "user"}]}, "missing_field"),
        ({"messages": [{"role": "oracle", "content": "q"}]}, "unknown_role"),
        ({"messages": [{"role": "user", "content": [1]}]}, "wrong_type"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
            "empty_response",
        ),
    ],
)
def test_broken_messages(record, reason):
    assert run([record], data_format="messages").skipped.count == {reason: 1}


def test_empty_text():
    assert run([{"text": ""}, {"text": None}, {"text": 1}], data_format="text").skipped.count == {
        "empty_text": 1,
        "missing_field": 1,
        "wrong_type": 1,
    }


def test_strict_stops_at_the_first_broken_line():
    with pytest.raises(DataError, match=r"dir/some.jsonl:12: missing_field\. Correct the line"):
        run(
            [{"instruction": "Q", "output": "A"}, b"", {"instruction": "Q"}, b"{"],
            first_line=10,
            strict=True,
        )


def test_truncation_to_the_length_of_a_sample():
    # "^ab\n" + "cdef$" is 9 tokens: a sample of 8 positions holds it whole.
    line = {"instruction": "ab", "output": "cdef"}
    assert run([line], seq_length=8).num_truncated == 0
    for seq_length, response in ((7, "cdef"), (6, "cde"), (4, "c")):
        encoded = run([line], seq_length=seq_length)
        assert (
            listed(encoded.train) == [[("^ab\n", 0), (response, 1)]] and encoded.num_truncated == 1
        )
    for seq_length in (3, 2, 1):
        encoded = run([line], seq_length=seq_length)
        assert (
            encoded.skipped.count == {"response_cut_away": 1}
            and encoded.num_truncated == 0
            and encoded.train.tokens.size == 0
        )
    encoded = run([line, line], seq_length=7, too_long="skip")
    assert encoded.skipped.count == {"too_long": 2} and encoded.skipped.where == {
        "too_long": ["some.jsonl:1", "some.jsonl:2"]
    }


def test_truncation_drops_later_turns():
    line = {
        "messages": [
            {"role": role, "content": content}
            for role, content in [
                ("user", "a"),
                ("assistant", "b"),
                ("user", "c"),
                ("assistant", "d"),
            ]
        ]
    }
    # ^a\n | b$ | c\n | d$ : 3 + 2 + 2 + 2 tokens
    assert listed(run([line], data_format="messages", seq_length=7).train) == [
        [("^a\n", 0), ("b$", 1), ("c\n", 0), ("d", 1)]
    ]
    assert listed(run([line], data_format="messages", seq_length=5).train) == [
        [("^a\n", 0), ("b$", 1), ("c", 0)]
    ]


def test_nothing_to_predict():
    tokenizer = Letters()
    tokenizer.adds_bos = False
    encoded = run(
        [{"text": "a"}, {"text": "ab"}], tokenizer=tokenizer, data_format="text", append_eod=False
    )
    assert encoded.skipped.count == {"nothing_to_predict": 1}


def test_validation_share_depends_on_the_text_only():
    lines = [{"instruction": f"Q{i}", "output": "A"} for i in range(2000)]
    encoded = run(lines, valid_fraction=0.1)
    train, valid = (
        {document[0][0] for document in listed(part)} for part in (encoded.train, encoded.valid)
    )
    assert len(train) + len(valid) == 2000 and not train & valid and 150 < len(valid) < 250
    again = run(lines[::-1][:1000] * 2, valid_fraction=0.1)
    assert {document[0][0] for document in listed(again.valid)} <= valid


def test_eos_must_exist():
    tokenizer = Letters()
    tokenizer.eos_id = None
    with pytest.raises(DataError, match="--append-eod: letters has no end-of-text token"):
        run([], tokenizer=tokenizer)
    assert run(
        [{"text": "a"}], tokenizer=tokenizer, data_format="text", append_eod=False
    ).train.tokens.tolist() == [1, 97]


def test_skipped_keeps_the_first_places_over_blocks():
    total = Skipped()
    for block in range(3):
        part = Skipped()
        for line in range(3):
            part.add("not_json", [f"f:{10 * block + line}"])
        total.merge(part)
    assert total.count == {"not_json": 9} and total.where == {
        "not_json": ["f:0", "f:1", "f:2", "f:10", "f:11"]
    }


def test_detect_format():
    assert [
        detect_format(r)
        for r in ({"instruction": "", "text": ""}, {"messages": 1}, {"text": ""}, {"x": 1}, [1])
    ] == ["instruction", "messages", "text", None, None]


TALK = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def test_a_null_field_counts_as_absent():
    nulls = {
        "messages": None,
        "instruction": None,
        "text": None,
        "input": None,
        "output": None,
        "tools": None,
        "documents": None,
    }
    for row in ({"text": "T"}, {"instruction": "I", "output": "O"}, {"messages": TALK}):
        assert detect_format({**nulls, **row}) == detect_format(row) == next(iter(row))
        for template in ("plain", "alpaca"):
            options = {"data_format": detect_format(row), "prompt_template": template}
            plain, other = (listed(run([one], **options).train) for one in (row, nulls | row))
            assert plain == other and plain
    assert detect_format(nulls) is None


def test_messages_with_nulls():
    padded = [
        {**message, "tool_calls": None, "name": None, "tool_call_id": None} for message in TALK
    ]
    assert listed(run([{"messages": padded}], data_format="messages").train) == [
        [("^Q\n", 0), ("A$", 1)]
    ]
    assert run(
        [{"messages": [{"role": "user", "content": None}, TALK[1]]}], data_format="messages"
    ).skipped.count == {"missing_field": 1}
    assert run(
        [{"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": None}]}],
        data_format="messages",
    ).skipped.count == {"missing_field": 1}
    call = {
        "id": None,
        "type": "function",
        "function": {"name": "f", "arguments": {"unit": None}, "strict": None},
    }
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = conversation_of({"messages": [TALK[0], called], "tools": None}, "messages")
    assert result.messages == [
        TALK[0],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"unit": None}}}
            ],
        },
    ]
    assert result.tools is None


def test_each_row_is_read_by_its_own_fields():
    rows = [
        {"messages": TALK, "instruction": None},
        {"messages": None, "instruction": "I", "output": "O"},
        {"messages": None, "text": "T"},
    ]
    for data_format in ("messages", "instruction"):
        assert run(rows, data_format=data_format).skipped.count == {
            "missing_field": 2
        }  # a format that is named is kept to
        encoded = run(rows, data_format=data_format, takes_both=True)
        assert listed(encoded.train) == [[("^Q\n", 0), ("A$", 1)], [("^I\n", 0), ("O$", 1)]]
        assert encoded.skipped.count == {"missing_field": 1}
    both = {"messages": TALK, "instruction": "I", "output": "O"}
    assert listed(run([both], data_format="instruction", takes_both=True).train) == [
        [("^I\n", 0), ("O$", 1)]
    ]


@pytest.mark.parametrize("data_format", ["auto", "text"])
@pytest.mark.parametrize("name", ["book.txt", "book.jsonl"])
def test_a_plain_text_is_refused_with_the_command_that_splits_it(tmp_path, data_format, name):
    (tmp_path / name).write_text("It was a dark night.\nAnd stormy.\n")
    encode = EncodeOptions(
        "NullTokenizer", None, 10, data_format, "plain", None, "truncate", False, 0.0, False
    )
    with pytest.raises(
        DataError,
        match=r"To convert a plain text, use megatron-sorted split "
        rf"--input .*{name} --separator .* --output ",
    ):
        prepare(PrepareOptions((str(tmp_path / name),), str(tmp_path / "out"), encode))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "write",
    [
        lambda rows: "\n".join(map(json.dumps, rows)),
        lambda rows: json.dumps(rows),
        lambda rows: json.dumps(rows, indent=2),
        lambda rows: "\ufeff" + "\r\n".join(map(json.dumps, rows)),
    ],
)
def test_the_same_records_in_any_form_are_the_same_data(tmp_path, write):
    rows = [{"text": f"1 {number}", "messages": None} for number in range(5, 9)]
    (tmp_path / "x").write_text(write(rows), newline="")
    encode = EncodeOptions(
        "NullTokenizer", None, 10, "auto", "plain", None, "truncate", False, 0.0, False
    )
    summary = prepare(PrepareOptions((str(tmp_path / "x"),), str(tmp_path / "out"), encode))
    data = open_indexed(str(tmp_path / "out_text_document"))
    assert [data.document(number).tolist() for number in range(4)] == [
        [1, 5],
        [1, 6],
        [1, 7],
        [1, 8],
    ] and summary.samples_read == 4
