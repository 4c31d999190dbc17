"""The plain and alpaca forms as chat templates.

Transformers writes with them what was trained.
"""

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_sorted.conversion.tokenizers.export import add_fast_tokenizer
from megatron_sorted.data.preparation.forms import SampleReader
from megatron_sorted.text.span_ids import SpanEncoder
from megatron_sorted.text.tokenizer.contract import NullTokenizer
from megatron_sorted.text.tokenizer.opening import open_tokenizer
from tests.support.chat_templates import write_fast_tokenizer
from tests.support.evaluated import write_tokenizer

TALK = [
    ("system", "Be\nbrief."),
    ("user", 'Say {{ hi }}, "Tom"\\n'),
    ("assistant", "hi there"),
    ("user", " Größer 猫? "),
    ("assistant", "Yes.\n\nNo"),
    ("tool", "3"),
    ("assistant", "three"),
]
INSTRUCTION = {"instruction": "Add the numbers", "input": "1 2", "output": "3"}


def tokenizer_of(kind: str, directory):
    if kind in ("sentencepiece", "both"):
        write_tokenizer(directory)
        add_fast_tokenizer(directory)
        if kind == "sentencepiece":
            (directory / "tokenizer.json").unlink()
        return open_tokenizer(directory)
    return open_tokenizer(
        write_fast_tokenizer(
            directory, like_gpt2=kind == "like_gpt2", add_bos_token=kind == "with_bos"
        )
    )


@pytest.mark.parametrize("name", ["plain", "alpaca"])
@pytest.mark.parametrize("kind", ["fast", "with_bos", "like_gpt2", "sentencepiece", "both"])
@pytest.mark.parametrize("append_eod", [True, False])
def test_template_writes_what_is_trained(tmp_path, name, kind, append_eod):
    tokenizer = tokenizer_of(kind, tmp_path)
    messages = [{"role": role, "content": content} for role, content in TALK]
    question = {
        "role": "user",
        "content": INSTRUCTION["instruction"],
        "input": INSTRUCTION["input"],
    }
    for record, data_format, as_messages in (
        ({"messages": messages}, "messages", messages),
        ({"messages": messages[1:3]}, "messages", messages[1:3]),
        (INSTRUCTION, "instruction", [question, {"role": "assistant", "content": "3"}]),
    ):
        reader = SampleReader(data_format, name, tokenizer, append_eod)
        [pieces] = reader.read(record).documents
        text = reader.form.render(as_messages)
        assert "".join(piece.text for piece in pieces) == text
        theirs = (
            PreTrainedTokenizerFast.from_pretrained(tmp_path)
            if kind not in ("sentencepiece",)
            else None
        )
        encoded = SpanEncoder(tokenizer, [end.text for end in reader.form.ends]).encode([pieces])[0]
        last = [token for ids, _ in encoded[-1] for token in ids]
        if theirs is not None:
            assert (
                theirs.apply_chat_template(
                    as_messages, chat_template=reader.form.template, tokenize=False
                )
                == text
            )
        if len(encoded) == 1:
            assert last == tokenizer.encode_rendered(text)
        turns = [
            place for place, message in enumerate(as_messages) if message["role"] == "assistant"
        ]
        for turn in turns:  # in use, a model is asked with ids that were trained
            prompt = tokenizer.encode_rendered(reader.form.render(as_messages[:turn]))
            assert any(
                [token for ids, _ in document for token in ids][: len(prompt)] == prompt
                for document in encoded
            )


def test_numbers_have_a_form_too():
    tokenizer = NullTokenizer(100)
    reader = SampleReader("instruction", "plain", tokenizer)
    [pieces] = reader.read({"instruction": "1 2", "output": "3 4"}).documents
    assert SpanEncoder(tokenizer, [" 99 "]).encode([pieces]) == [
        [[([1, 2], False), ([3, 4, 99], True)]]
    ]
