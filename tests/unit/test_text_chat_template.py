"""Chat templates are rendered as transformers renders them, at a bounded cost."""

import time

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_sorted.errors import DataError
from megatron_sorted.text.chat_template import ChatTemplate, TemplateRefusal
from megatron_sorted.text.tokenizer.opening import open_tokenizer
from tests.support.chat_templates import FAMILIES, TAGGED, write_fast_tokenizer

TALK = [
    {"role": "user", "content": "say hi"},
    {"role": "assistant", "content": 'hi <there> & "you" ü猫'},
    {"role": "user", "content": " name "},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ü<", "parameters": {}}}]
CALLS = [
    {"role": "user", "content": "call"},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "must call",
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"x": [1, "é"]}}}
        ],
    },
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "three", "reasoning_content": "so"},
]


@pytest.mark.parametrize("family", [*FAMILIES, "tagged"])
@pytest.mark.parametrize("asks", [False, True])
def test_text_and_ids_equal_those_of_transformers(tmp_path, family, asks):
    template = {**FAMILIES, "tagged": TAGGED}[family]
    own = open_tokenizer(write_fast_tokenizer(tmp_path, template))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    compiled = ChatTemplate(own.chat_templates["default"], "t")
    talks = [(TALK, None), ([{"role": "system", "content": "be\nbrief"}, *TALK], None)] + [
        (CALLS, TOOLS)
    ] * (family == "thinks")
    for messages, tools in talks:
        text = compiled.render(messages, own.special_tokens, asks, tools)
        assert text == theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=asks, tokenize=False
        )
        assert own.encode_rendered(text) == theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=asks, return_dict=False
        )


def test_what_templates_may_use_is_as_in_transformers(tmp_path):
    theirs = PreTrainedTokenizerFast.from_pretrained(write_fast_tokenizer(tmp_path))
    own = open_tokenizer(tmp_path)
    for template in (
        "{{ strftime_now('%Y') }}",
        "{{ messages | tojson(indent=1) }}",
        "{{ dict(a=1).a }}{{ unk_token }}",
        "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + loop.length %}{% "
        "if loop.index > 1 %}{% break %}{% endif %}{{ n.a ~ m.role ~ loop.last }}{% endfor %}",
        "{{ '{%1234567}'.replace('1', '2') | replace('3', '4') }}",
        "{{ tools is none }}{{ documents is none }}{{ x is defined }}",
        "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ loop.index }}{{ "
        "loop.revindex }}{{ m.content }}{% endfor %}",
        "{{ 'a%s' | format(1) | indent(2) | center(9) }}{{ '%d' % 3 }}{{ 'ab'.replace('a', 'c') * "
        "3 }}{{ 2 ** 3 }}",
        "  {% if x %}no{% else %}yes{% endif %}\n  {%- macro f(a) %}<{{ a }}>{% endmacro %}{{ "
        "f('b') }}\n",
    ):
        assert ChatTemplate(template, "t").render(
            TALK, own.special_tokens
        ) == theirs.apply_chat_template(TALK, chat_template=template, tokenize=False)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ needed }}", "'needed'"),
        ("{{ 'a' ~ needed }}", "'needed'"),
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{{ messages[0].x.y }}", "no attribute"),
        ("{{ 'a' * 1000000 }}", "beyond"),
        ("{{ 10 ** 10 ** 10 }}", "beyond"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        (
            "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(900) }}",
            "recursion|steps",
        ),
        (
            "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x "
            "%}{% endfor %}",
            "characters",
        ),
        (
            "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x "
            "%}{% endfor %}",
            "characters",
        ),
        (
            "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% "
            "endfor %}",
            "entries",
        ),
        ("{{ 'a' | center(100000000) }}", "fills"),
        ("{{ 'a'.ljust(100000000) }}", "fills"),
        ("{{ '%1000000000d' % 3 }}", "fills"),
        ("{{ '{:1000000000d}'.format(3) }}", "fills"),
        ("{{ ('a' * 9999) | replace('a', 'b' * 9999) }}", "characters"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "class|undefined"),
        ("{% set n = namespace(_a=1) %}", "_a"),
    ],
)
def test_templates_that_fail_or_take_too_much(template, reason):
    began = time.process_time()
    with pytest.raises(TemplateRefusal, match=reason):
        ChatTemplate(template, "t").render(TALK, {})
    assert time.process_time() - began < 5


def test_no_templates():
    with pytest.raises(DataError, match=r"mine: not a template .*plain"):
        ChatTemplate("{% for", "mine")
    with pytest.raises(DataError, match=r"mine: 300,000 characters, more than the 262,144"):
        ChatTemplate("a" * 300_000, "mine")
    text, spans = ChatTemplate(TAGGED, "t").generation_spans(TALK, {})
    assert [text[begin:end] for begin, end in spans] == [TALK[1]["content"] + "<|im_end|>"]
