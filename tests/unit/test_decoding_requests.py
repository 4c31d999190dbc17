"""Requests: neutral and null fields are accepted, wrong ones refused by name at a bounded cost."""

import json
import time
import tracemalloc

import pytest

pytest.importorskip("fastapi", reason="serving is an extra")
from megatron_sorted.decoding.strategies import SamplingParameters
from megatron_sorted.serving.answers import RefusedError
from megatron_sorted.serving.body import parse_body
from megatron_sorted.serving.prompts import read_prompts
from megatron_sorted.serving.requests import (
    ChatRequest,
    CompletionRequest,
    read_request,
    read_stop_sequences,
)
from megatron_sorted.serving.turns import read_messages

JSON = "application/json"
USER = [{"role": "user", "content": "Hi"}]


def completion(**more) -> CompletionRequest:
    return read_request(CompletionRequest, {"prompt": "a", **more})


def chat(**more) -> ChatRequest:
    return read_request(ChatRequest, {"messages": USER, **more})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 0),
        ("frequency_penalty", 0.0),
        ("presence_penalty", None),
        ("logit_bias", {}),
        ("logit_bias", None),
        ("response_format", {"type": "text"}),
        ("tools", []),
        ("tool_choice", "none"),
        ("parallel_tool_calls", True),
        ("store", False),
        ("metadata", {"a": "b"}),
        ("service_tier", "auto"),
        ("modalities", ["text"]),
        ("audio", None),
        ("verbosity", None),
        ("user", "x"),
        ("n", None),
        ("stop", None),
        ("stream", None),
        ("stream_options", None),
        ("seed", None),
        ("max_tokens", None),
        ("min_p", 0),
        ("temperature", None),
        ("top_p", None),
        ("model", None),
        ("way", None),
        ("task", None),
        ("logprobs", False),
        ("logprobs", None),
        ("safety_identifier", "a"),
        ("prompt_cache_key", "b"),
        ("reasoning_effort", None),
    ],
)
@pytest.mark.parametrize("ask", [completion, chat])
def test_values_without_effect_are_accepted(ask, name, value):
    request = ask(**{name: value})
    assert (
        request.sampling(SamplingParameters(temperature=1.0), 3)
        == SamplingParameters(temperature=1.0, seed=3)
        and request.num_top_logprobs is None
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 0.5),
        ("presence_penalty", False),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("store", True),
        ("min_p", 0.1),
        ("audio", {}),
        ("best_of", 3),
        ("ignore_eos", True),
        ("colour", None),
        ("stream_options", {"include_usage": True}),
        ("seed", 1 << 64),
        ("top_logprobs", 3),
    ],
)
def test_unsupported_values_are_refused_by_name(name, value):
    with pytest.raises(RefusedError) as refused:
        chat(**{name: value})
    assert refused.value.field == name and name in str(refused.value)


def test_numbers_of_other_servers_that_mean_none():
    usual = SamplingParameters(temperature=0.7, top_k=40, top_p=0.9, repetition_penalty=1.1)
    assert completion(top_k=-1, top_p=1).sampling(usual, 0) == SamplingParameters(
        0.7, None, 1.0, 1.1, 0
    )
    assert completion(top_k=0).sampling(usual, 0).top_k is None
    assert completion(top_p=0).sampling(usual, 0) == SamplingParameters(0.7, 1, None, 1.1, 0), (
        "the fewest tokens that sum to 0: one"
    )
    assert completion().sampling(usual, 5) == SamplingParameters(0.7, 40, 0.9, 1.1, 5)
    assert (
        completion(max_tokens=0).max_tokens == 0 and chat(max_completion_tokens=4).max_tokens == 4
    )


def test_the_four_forms_of_prompts():
    read = lambda value: read_prompts(value, 64, 8, 100)  # noqa: E731
    assert (
        read("a") == ["a"]
        and read(["a", "b"]) == ["a", "b"]
        and read([1, 2]) == [[1, 2]]
        and read([[1], [2, 3]]) == [[1], [2, 3]]
    )
    for value, field, message in (
        (["a"] * 65, "prompt", "65 prompts are more than 64"),
        ([], "prompt", "the list is empty"),
        ([-1], "prompt", "-1 is not"),
        ([100], "prompt", "0..99"),
        ([1] * 9, "prompt", "9 tokens are more"),
        ([[1], []], "prompt.1", "no tokens"),
        ([[1], [1, "a"]], "prompt.1", '"a" is not a token'),
        (["a", 1], "prompt.0", "is a str"),
        ([True], "prompt.0", "bool"),
        ([1, True], "prompt", "true is not a token"),
        (5, "prompt", "is a int"),
        ([1, 10**400], "prompt", "is not a token"),
        ([["a"]], "prompt.0", "is not a token"),
        ({"a": 1}, "prompt", "a dict of 1"),
    ):
        with pytest.raises(RefusedError) as refused:
            read(value)
        assert refused.value.field == field and message in str(refused.value), value


def test_stop_sequences():
    assert (
        read_stop_sequences(None) == []
        and read_stop_sequences("a") == ["a"]
        and read_stop_sequences(["a", "b"]) == ["a", "b"]
    )
    for value, message in (
        (["a"] * 9, "9 stop sequences are more than 8"),
        ([""], "of 0 characters"),
        ([3], "int"),
        ({}, "dict"),
    ):
        with pytest.raises(RefusedError, match=message):
            read_stop_sequences(value)


def test_turns_with_parts_and_with_tools():
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    read = read_messages(
        [
            {
                "role": "system",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "tool_call_id": "x", "content": "1"},
        ],
        10,
    )
    assert read == [
        {"role": "system", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "x"},
    ]
    for turn, field in (
        ({"role": "robot", "content": "a"}, ".role"),
        ({"role": "user", "content": None}, ".content"),
        ({}, ".role"),
        ("a", ""),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]},
            ".content.0",
        ),
        ({"role": []}, ".role"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content.0"),
        ({"role": "user", "content": ["a"]}, ".content.0"),
        ({"role": "assistant", "tool_calls": [{}]}, ".tool_calls.0"),
        ({"role": "assistant", "tool_calls": "a"}, ".tool_calls.0"),
        ({"role": "user", "content": [{"type": []}]}, ".content.0"),
        ({"role": "user", "content": 5}, ".content"),
    ):
        with pytest.raises(RefusedError) as refused:
            read_messages([*USER, turn], 10)
        assert refused.value.field == f"messages.1{field}"


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "Once \\ud83d"}',
        b'{"prompt": ["Once \\uD83D"]}',
        b'{"user": "\\udc00"}',
        b'{"\\ud800": 1}',
    ],
)
def test_half_of_a_utf_16_pair_is_refused_by_its_field(body):
    with pytest.raises(RefusedError) as refused:
        parse_body(body, JSON)
    assert refused.value.field == next(iter(json.loads(body))) and "half of a UTF-16 pair" in str(
        refused.value
    )


def test_whole_pairs_are_text():
    assert parse_body(b'{"prompt": "\\ud83d\\ude00"}', JSON) == {"prompt": "\U0001f600"}


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b'{"prompt":"a",', JSON, "not JSON .* at line 1, column 15"),
        (b"[]", JSON, "it is a list"),
        (b'{"a": NaN}', JSON, "NaN is not JSON"),
        (
            b'{"prompt":"a"}',
            "application/x-www-form-urlencoded",
            "Send the header 'content-type: application/json'",
        ),
        (b'{"prompt":"a"}', "", "content-type: '' is not JSON"),
        (b'{"prompt":"\xff"}', JSON, "byte 11 is not UTF-8"),
        (b"[" * 5000, JSON, "nested more than 100 deep"),
        (b'{"a":' + b"1" * 5000 + b"}", JSON, "5,000 digits"),
    ],
)
def test_errors_of_bodies_that_are_not_json(body, kind, message):
    with pytest.raises(RefusedError, match=message):
        parse_body(body, kind)


BOMBS = {
    "tokens": b'{"prompt": [' + b"-1," * 250_000 + b"-1]}",
    "turns": b'{"messages": [' + b"{}," * 49_000 + b"{}]}",
    "too many tokens": b'{"prompt": [' + b"-1," * 1_000_000 + b"-1]}",
    "too many turns": b'{"messages": [' + b"{}," * 1_000_000 + b"{}]}",
    "lists": b'{"prompt": [' + b"[-1]," * 49_000 + b"[-1]]}",
    "stops": b'{"prompt": "a", "stop": [' + b'"",' * 250_000 + b'""]}',
    "fields": b'{"prompt": "a"'
    + b"".join(b', "f%d": 1' % number for number in range(100_000))
    + b"}",
    "options": b'{"prompt": "a", "stream_options": {"a": 1'
    + b"".join(b', "f%d": 1' % number for number in range(100_000))
    + b"}}",
    "parts": b'{"messages": [{"role": "user", "content": [' + b"{}," * 49_000 + b"{}]}]}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_list_of_mistakes_costs_one_error(name):
    def refuse() -> None:
        with pytest.raises(RefusedError) as refused:
            values = parse_body(BOMBS[name], JSON)
            if b'"messages"' in BOMBS[name][:20]:
                read_messages(read_request(ChatRequest, values).messages, 512)
            else:
                request = read_request(CompletionRequest, values)
                read_prompts(request.prompt, 64, 512, 320)
                read_stop_sequences(request.stop)
        assert len(str(refused.value)) < 300 and (
            "elements" in str(refused.value)
        ) is name.startswith("too many")

    began = time.process_time()
    refuse()
    assert time.process_time() - began < 2, "0.05 s on an idle machine"
    if name in ("tokens", "turns", "lists"):
        tracemalloc.start()
        refuse()
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
        tracemalloc.stop()
