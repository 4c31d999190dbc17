"""Which tokens of a conversation are trained, against the rendered text by characters."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_sorted.data.preparation.encode import EncodeOptions, Encoder
from megatron_sorted.data.preparation.prepare import with_ends
from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_lines import Block
from megatron_sorted.text.conversation import chat_form
from megatron_sorted.text.prompt_form import form_from_dict
from megatron_sorted.text.tokenizer.opening import open_tokenizer
from tests.support.chat_templates import (
    CHATML,
    FAMILIES,
    INST,
    TAGGED,
    THINKS,
    as_written,
    write_fast_tokenizer,
)

TALK = [
    {"role": "user", "content": "say hi"},
    {"role": "assistant", "content": "hi there"},
    {"role": "user", "content": "name a pet"},
    {"role": "assistant", "content": "a dog,\n and ü猫"},
    {"role": "user", "content": "unanswered"},
]
CALLS = [
    {"role": "user", "content": "two plus two"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "call",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
    },
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "four", "reasoning_content": "as given"},
]


def encoder(directory, template, **options) -> Encoder:
    defaults = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(write_fast_tokenizer(directory, template)),
        "vocab_size": None,
        "data_format": "messages",
        "prompt_template": "auto",
        "seq_length": None,
        "too_long": "truncate",
        "append_eod": True,
        "valid_fraction": 0.0,
        "strict": False,
    }
    return Encoder(EncodeOptions(**defaults | options))


def prepared(made: Encoder, *records) -> tuple[list[tuple[list[int], list[bool]]], dict]:
    """Return (ids, trained) of every document, and the counts of skipped ones."""
    encoded = made.encode(
        Block("some.jsonl", 1, b"\n".join(json.dumps(record).encode() for record in records))
    )
    documents, place, sequence = [], 0, 0
    for count in encoded.train.num_sequences:
        ids, trained = [], []
        for length, mode in zip(
            encoded.train.lengths[sequence : sequence + count],
            encoded.train.modes[sequence : sequence + count],
            strict=True,
        ):
            ids += encoded.train.tokens[place : place + length].tolist()
            trained += [bool(mode)] * length
            place += length
        sequence += count
        documents.append((ids, trained))
    return documents, encoded.skipped.count


def by_characters(directory, messages, answers, tools=None) -> tuple[list[int], list[bool]]:
    """Return the ids of the whole text by transformers, and whether each lies in an answer."""
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    text = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    spans, place = [], 0
    for answer in answers:
        begin = text.index(answer, place)
        place = begin + len(answer)
        spans.append((begin, place))
    read = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    return read["input_ids"], [
        any(begin <= first and last <= end for begin, end in spans)
        for first, last in read["offset_mapping"]
    ]


@pytest.mark.parametrize("family", [*FAMILIES, "tagged"])
def test_answers_and_their_ends_alone_are_trained(tmp_path, family):
    made = encoder(tmp_path, {**FAMILIES, "tagged": TAGGED}[family])
    documents, left_out = prepared(made, {"messages": TALK})
    # reasoning is shown after the last question only, so the first answer has its own document
    if family == "thinks":
        wanted = [
            by_characters(tmp_path, TALK[:2], [as_written(family, TALK[1])]),
            by_characters(tmp_path, TALK[:4], [as_written(family, TALK[3])]),
        ]
    else:
        wanted = [
            by_characters(
                tmp_path, TALK[:4], [as_written(family, message) for message in TALK[1:4:2]]
            )
        ]
    assert documents == wanted and left_out == {}
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for (ids, trained), prompt_messages in zip(
        documents, (TALK[:1], TALK[:3]), strict=False
    ):  # in use a model is asked with the trained prompt
        prompt = theirs.apply_chat_template(
            prompt_messages, add_generation_prompt=True, return_dict=False
        )
        assert (
            ids[: len(prompt)] == prompt
            and not any(trained[: len(prompt)])
            and trained[len(prompt)]
        )


def test_tool_calls_and_reasoning(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    documents, _ = prepared(
        encoder(tmp_path, THINKS), {"messages": CALLS, "tools": json.dumps(tools)}
    )
    assert documents == [
        by_characters(
            tmp_path, CALLS, [as_written("thinks", CALLS[1]), as_written("thinks", CALLS[3])], tools
        )
    ]
    longer = [
        *CALLS,
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "still four"},
    ]
    documents, _ = prepared(encoder(tmp_path, THINKS), {"messages": longer, "tools": tools})
    assert documents == [
        by_characters(
            tmp_path, CALLS, [as_written("thinks", CALLS[1]), as_written("thinks", CALLS[3])], tools
        ),
        by_characters(tmp_path, longer, [as_written("thinks", longer[-1])], tools),
    ]


def test_other_ends_of_calls_are_kept(tmp_path):
    template = CHATML.replace(
        "~ '<|im_end|>'", "~ ('<|eot_id|>' if message.tool_calls else '<|im_end|>')"
    )
    made = encoder(tmp_path, template)
    calls = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "f()", "tool_calls": [{}]},
    ]
    encoded = made.encode(Block("some.jsonl", 1, json.dumps({"messages": calls}).encode()))
    form = with_ends(made.form, encoded.ends, made.tokenizer)
    assert [end.text for end in form.ends] == ["<|im_end|>", "<|eot_id|>"]
    assert form_from_dict(json.loads(form.as_json()), "here").as_dict() == form.as_dict()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": TALK[:1]}, "no_assistant_turn"),
        ({"messages": TALK[1:3]}, "refused_by_template"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, "empty_response"),
        (
            {"messages": [TALK[0], {"role": "assistant", "content": "a</s>b"}]},
            "control_token_in_answer",
        ),
        ({"messages": [TALK[0], {"role": "assistant", "content": 3}]}, "wrong_type"),
        ({"messages": [{"role": "user"}]}, "missing_field"),
        ({"messages": [TALK[0], TALK[0], TALK[1]]}, "refused_by_template"),
    ],
)
def test_skipped_conversations(tmp_path, record, reason):
    documents, left_out = prepared(encoder(tmp_path, INST), record, {"messages": TALK[:2]})
    assert len(documents) == 1 and left_out == {reason: 1}


@pytest.mark.parametrize(
    ("family", "answer"), [("headers", "hi"), ("chatml", "\n\nhi"), ("chatml", " hi")]
)
def test_each_answer_follows_the_prompt_of_use_where_a_token_crosses_turns(
    tmp_path, family, answer
):
    # GPT-2's rules make two line breaks one token at the end of a prompt and two in front of an
    # answer
    write_fast_tokenizer(tmp_path, FAMILIES[family], like_gpt2=True)
    options = EncodeOptions(
        "HuggingFaceTokenizer",
        str(tmp_path),
        None,
        "messages",
        "chat",
        None,
        "truncate",
        True,
        0.0,
        False,
    )
    talk = [TALK[0], {"role": "assistant", "content": answer}, *TALK[2:4]]
    documents, left_out = prepared(Encoder(options), {"messages": talk})
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (left_out == {} and len(documents) == 2) or answer == " hi"
    for count in (1, 3):
        prompt = theirs.apply_chat_template(
            talk[:count], add_generation_prompt=True, return_dict=False
        )
        ids, trained = next(
            encoded
            for encoded in documents
            if encoded[0][: len(prompt)] == prompt and encoded[1][len(prompt)]
        )
        last = next(
            (place for place in range(len(prompt), len(ids)) if not trained[place]), len(ids)
        )
        assert (
            theirs.decode(ids[len(prompt) : last]).strip()
            == as_written(family, talk[count]).strip()
        )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}{{ needed }}", "needs the variable 'needed'"),
        ("{{ raise_exception('never') }}", "fails on one question.*never"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "holds no control token"),
        (
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt "
            "%}A:{% endif %}",
            "does not begin with",
        ),
        ("{% for m in messages %}{{ m.role }}</s>{% endfor %}", "leaves out the question"),
        (
            "{% for m in messages %}{{ m.content ~ m.content }}</s>{% endfor %}",
            "writes an answer 2 times",
        ),
        ("{% if", "not a template"),
    ],
)
def test_templates_that_cannot_be_trained_are_refused_by_name(tmp_path, template, message):
    with pytest.raises(DataError, match=rf"chat template 'default' of .*{message}"):
        encoder(tmp_path, template)


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": THINKS}]
    tokenizer = open_tokenizer(write_fast_tokenizer(tmp_path, None, chat_template=named))
    assert (
        chat_form(tokenizer, None)[0].template == CHATML
        and chat_form(tokenizer, "tool_use")[0].label == "chat:tool_use"
    )
    with pytest.raises(DataError, match=r"chat:rag: .* has the chat templates default, tool_use"):
        chat_form(tokenizer, "rag")
