"""The server answers as OpenAI's does; malformed requests are refused by field, and it lives on."""

import json
import math
import threading
import time
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("fastapi", reason="serving is an extra")
from fastapi.testclient import TestClient

from megatron_sorted.decoding import text_generator as text_generator_module
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.requested_strategy import check_strategy
from megatron_sorted.decoding.strategies import Fixed, Full, SamplingParameters, SelfSpeculative
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.serving.api import make_app
from megatron_sorted.serving.job import Job
from megatron_sorted.serving.worker import GenerationWorker
from tests.support.decoding import plain_network
from tests.unit.test_decoding_text_generator import Letters

STRATEGIES = {
    None: SelfSpeculative(2, 4),
    "full": Full(),
    "self_speculative": SelfSpeculative(1, 2),
    "fixed": SelfSpeculative(9, 2),
}


class NamedLetters(Letters):
    """The same tokenizer, with names for tokens that are no whole character."""

    @staticmethod
    def token_text(token: int) -> str:
        return f"token {token}"


@pytest.fixture
def served():
    _, network = plain_network("llama")
    writer = TextGenerator(network, NamedLetters())
    worker = GenerationWorker(writer)

    def strategy_of(name):
        strategy = STRATEGIES[name]
        check_strategy(strategy, network)
        return strategy

    with TestClient(make_app(worker, "tiny", strategy_of)) as client:
        yield client, writer, worker
    worker.close()


def expected(
    writer: TextGenerator, ids: list[int], count: int, sampling: SamplingParameters | None = None
) -> str:
    [text] = generate(writer.network, [ids], Full(), sampling, Limits(count))
    return writer.tokenizer.decode(text.tokens)


def test_completions_of_one_and_of_many_prompts(served):
    client, writer, _ = served
    ask = {"model": "tiny", "prompt": "hello", "max_tokens": 12, "temperature": 0}
    answer = client.post("/v1/completions", json=ask).json()
    wanted = expected(writer, writer.encode("hello"), 12)
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": wanted, "logprobs": None, "finish_reason": "length"}
    ]
    counts = {"prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18}
    assert answer["usage"].items() >= counts.items()
    many = client.post(
        "/v1/completions", json={**ask, "prompt": ["hello", "b"], "echo": True, "strategy": "full"}
    ).json()
    assert [choice["text"] for choice in many["choices"]] == [
        "hello" + wanted,
        "b" + expected(writer, writer.encode("b"), 12),
    ]
    bare = client.post("/v1/completions", json={**ask, "prompt": [5, 6, 7]}).json()
    assert bare["choices"][0]["text"] == expected(writer, [5, 6, 7], 12)
    echoed = client.post("/v1/completions", json={**ask, "prompt": [5, 6, 7], "echo": True}).json()
    assert (
        echoed["choices"][0]["text"]
        == writer.tokenizer.decode([5, 6, 7]) + bare["choices"][0]["text"]
    )
    sampled = client.post(
        "/v1/completions", json={**ask, "temperature": 0.8, "seed": 5, "top_p": 0.9, "n": 2}
    ).json()
    assert sampled["choices"][0]["text"] == expected(
        writer, writer.encode("hello"), 12, SamplingParameters(0.8, top_p=0.9, seed=5)
    )
    assert sampled["choices"][0]["text"] != sampled["choices"][1]["text"]


def test_a_stop_sequence_and_a_conversation(served):
    client, writer, _ = served
    ids = writer.encode_chat([{"role": "user", "content": "hi"}])
    whole = expected(writer, ids, 30)
    ask = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 30,
        "temperature": 0,
        "stop": whole[10:13],
    }
    [choice] = client.post("/v1/chat/completions", json=ask).json()["choices"]
    wanted = whole[: whole.index(whole[10:13])].lstrip(" ")
    assert (
        choice["message"] == {"role": "assistant", "content": wanted}
        and choice["finish_reason"] == "stop"
    )


@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams(served, path, with_usage):
    client, writer, _ = served
    more = {"stream_options": {"include_usage": True}} if with_usage else {}
    is_chat = "chat" in path
    ask = {"messages": [{"role": "user", "content": "hi"}]} if is_chat else {"prompt": "hi"}
    with client.stream(
        "POST", path, json={**ask, "max_tokens": 20, "temperature": 0, "stream": True, **more}
    ) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(
            "text/event-stream"
        )
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    parts = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(
        choice["delta"].get("content", "") if is_chat else choice["text"] for choice in parts
    )
    ids = writer.encode_chat(ask["messages"]) if is_chat else writer.encode("hi")
    wanted = expected(writer, ids, 20)
    assert (
        text == (wanted.lstrip(" ") if is_chat else wanted)
        and parts[-1]["finish_reason"] == "length"
    )
    assert len({chunk["id"] for chunk in chunks}) == 1
    if with_usage:
        assert chunks.pop()["usage"]["completion_tokens"] == 20
    assert all(len(chunk["choices"]) == 1 for chunk in chunks), (
        "clients look at the first choice of every chunk"
    )


def test_a_stream_has_no_ends_of_lines_within_lines(served, monkeypatch):
    client, writer, _ = served
    monkeypatch.setattr(writer.tokenizer, "decode", lambda ids: "a\u2028b\x85c\n" * len(ids))
    with client.stream(
        "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True}
    ) as answer:
        chunks = [
            json.loads(line.removeprefix("data: "))
            for line in answer.iter_lines()
            if line and "[DONE]" not in line
        ]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "a\u2028b\x85c\n" * 2


BAD = [
    ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    ({"prompt": "a", "top_p": 2}, 400, "top_p"),
    ({"prompt": "a", "stop": ""}, 400, "stop"),
    ({"prompt": "a", "n": 99}, 400, "n"),
    ({"prompt": []}, 400, "prompt"),
    ({}, 400, "prompt"),
    ({"prompt": "a", "colour": "red"}, 400, "colour"),
    ({"prompt": "a", "model": "other"}, 404, "model"),
    ({"prompt": "a" * 999}, 400, "prompt"),
    ({"prompt": [5000]}, 400, "prompt"),
    ({"prompt": "a", "strategy": "fast"}, 400, "strategy"),
    ({"prompt": "a", "strategy": "fixed"}, 400, "strategy"),
    ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": "a", "task": ""}, 400, "task"),
    ({"prompt": "a", "task": "a" * 65}, 400, "task"),
    ({"prompt": "a", "task": 3}, 400, "task"),
    ({"prompt": [5000], "echo": True}, 400, "prompt"),
    ({"prompt": [5000], "stream": True}, 400, "prompt"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    (
        {"prompt": "a", "stream": True, "stream_options": {"usage": True}},
        400,
        "stream_options.usage",
    ),
    (
        {"prompt": "a", "stream": True, "stream_options": {"include_usage": "maybe"}},
        400,
        "stream_options.include_usage",
    ),
    ({"prompt": "a", "task": "\ud800"}, 400, "task"),
]


@pytest.mark.parametrize(
    ("body", "status", "field"), BAD, ids=[str(body)[:40] for body, _, _ in BAD]
)
def test_a_malformed_request_is_refused_by_its_field(served, body, status, field):
    client, *_ = served
    answer = client.post(
        "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == field and error["message"], (
        answer.text
    )
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("content", "body"),
    [
        ("application/json", b"{"),
        ("application/json", b""),
        ("text/plain", b"hello"),
        ("application/json", b'{"prompt": "\xff"}'),
        ("application/json", b"[" * 100_000),
        ("application/json", b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}"),
    ],
    ids=["cut off", "empty", "no JSON", "no UTF-8", "deep", "long number"],
)
def test_bodies_that_are_not_json_are_refused(served, content, body):
    client, *_ = served
    answer = client.post("/v1/completions", content=body, headers={"content-type": content})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_other_paths_are_errors_in_the_same_format(served):
    client, *_ = served
    for answer, status in (
        (client.get("/nowhere"), 404),
        (client.get("/v1/completions"), 405),
        (client.get("/v1/../../etc/passwd"), 404),
    ):
        assert (
            answer.status_code == status
            and answer.json()["error"]["type"] == "invalid_request_error"
        )


def test_wrong_conversations_are_refused(served):
    client, *_ = served
    for messages in ([], [{"role": "robot", "content": "a"}], [{"role": "user"}], "hi"):
        answer = client.post("/v1/chat/completions", json={"messages": messages})
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("messages")


def test_out_of_memory_and_failures_are_reported_and_the_server_lives_on(served, monkeypatch):
    client, *_ = served
    host = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 9 bytes."
    )
    for error, status in (
        (torch.OutOfMemoryError("no room"), 503),
        (host, 503),
        (MemoryError(), 503),
        (RuntimeError("broken"), 500),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(text_generator_module, "start_batch", Mock(side_effect=error))
            answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert answer.status_code == status and answer.json()["error"]["type"] == "server_error"
        assert (
            client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        )


def test_a_server_without_adaptation_accepts_tasks(served):
    client, *_ = served
    assert (
        client.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 2, "task": "b"}
        ).status_code
        == 200
    )
    answer = client.get("/v1/adaptation")
    assert answer.status_code == 404 and "--adapt" in answer.json()["error"]["message"]


def test_a_cancelled_job_ends(served):
    _, writer, worker = served
    job = Job([writer.encode("a")], Full(), SamplingParameters(), 200, [])
    job.notify = lambda: job.cancelled.set() if job.outputs.qsize() == 3 else None
    worker.submit(job)
    behind = worker.submit(Job([writer.encode("a")], Full(), SamplingParameters(), 2, []))
    assert len(list(behind.results())) == 2
    assert len(list(job.results())) == 3, "the job was not ended"
    late = Job([writer.encode("a")], Full(), SamplingParameters(), 200, [])
    late.cancelled.set()
    assert list(worker.submit(late).results()) == [], "the client left before the job's turn came"


def test_requests_that_come_at_once_are_answered_one_after_another(served):
    client, writer, _ = served
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answer = client.post(
            "/v1/completions", json={"prompt": "a" * number, "max_tokens": 8, "temperature": 0}
        ).json()
        answers[number] = answer["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    for thread in threads:
        thread.join(max(0, until - time.monotonic()))
    assert answers == {
        number: expected(writer, writer.encode("a" * number), 8) for number in range(1, 7)
    }


def log_softmax_of(case, ids: list[int]) -> torch.Tensor:
    """Return transformers' log-probabilities of the tokens after each of these [s, v]."""
    return case.logits(4, torch.tensor([ids]))[0].double().log_softmax(-1)


def test_logprobs_of_prompts_and_texts_are_those_of_transformers(served):
    client, writer, _ = served
    case, _ = plain_network("llama")
    prompts = [[5, 6, 7, 8], [11, 3]]
    ask = {
        "prompt": prompts,
        "max_tokens": 6,
        "temperature": 0.9,
        "seed": 3,
        "logprobs": 3,
        "echo": True,
    }
    for more in ({}, {"strategy": "full"}):  # the server's own strategy is speculative
        choices = client.post("/v1/completions", json={**ask, **more}).json()["choices"]
        for prompt, choice in zip(prompts, choices, strict=True):
            score_rows = choice["logprobs"]
            texts = generate(
                writer.network,
                prompts,
                Full(),
                SamplingParameters(0.9, seed=3),
                Limits(6, writer.end_ids),
            )
            ids = [*prompt, *texts[prompts.index(prompt)].tokens]
            expected_sv = log_softmax_of(case, ids[:-1])
            assert (
                len(score_rows["tokens"])
                == len(score_rows["token_logprobs"])
                == len(score_rows["text_offset"])
                == len(ids)
            )
            assert score_rows["token_logprobs"][0] is None and score_rows["top_logprobs"][0] is None
            for place in range(1, len(ids)):
                row = expected_sv[place - 1]
                assert math.isclose(
                    score_rows["token_logprobs"][place], row[ids[place]], abs_tol=1e-5
                )
                best = sorted(score_rows["top_logprobs"][place].values(), reverse=True)[:3]
                assert torch.allclose(
                    torch.tensor(best, dtype=torch.double), row.topk(len(best)).values, atol=1e-5
                )
    bare = client.post(
        "/v1/completions", json={**ask, "echo": False, "max_tokens": 2, "logprobs": 0}
    ).json()["choices"][0]["logprobs"]
    assert (
        len(bare["tokens"]) == 2
        and bare["top_logprobs"] == [{}, {}]
        and bare["text_offset"][0] == 0
    )


def test_logprobs_of_likelihoods_need_no_new_token(served):
    client, *_ = served
    case, _ = plain_network("llama")
    ids = [5, 6, 7, 8, 9]
    for count in (0, 1):
        [choice] = client.post(
            "/v1/completions",
            json={
                "prompt": [ids],
                "max_tokens": count,
                "temperature": 0,
                "logprobs": 1,
                "echo": True,
                "seed": 1234,
            },
        ).json()["choices"]
        score_rows = choice["logprobs"]["token_logprobs"]
        assert choice["finish_reason"] == "length" and len(score_rows) == 5 + count
        expected_sv = log_softmax_of(case, ids)
        assert all(
            math.isclose(score_rows[place], expected_sv[place - 1, ids[place]], abs_tol=1e-5)
            for place in range(1, 5)
        )
        is_greedy = [
            one == max(top.values())
            for one, top in zip(score_rows[1:], choice["logprobs"]["top_logprobs"][1:], strict=True)
        ]
        assert is_greedy[:4] == [
            int(expected_sv[place - 1].argmax()) == ids[place] for place in range(1, 5)
        ]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_logprobs_in_streams_are_those_of_whole_answers(served, path):
    client, *_ = served
    ask = {"max_tokens": 7, "temperature": 0.5, "seed": 2}
    if "chat" in path:
        ask |= {
            "messages": [{"role": "user", "content": "hi"}],
            "logprobs": True,
            "top_logprobs": 2,
        }
        join = lambda parts: [one for part in parts for one in part["content"]]  # noqa: E731
    else:
        ask |= {"prompt": "hi", "logprobs": 2, "echo": True}

        def join(parts):
            return [
                one
                for part in parts
                for one in zip(
                    part["tokens"], part["token_logprobs"], part["text_offset"], strict=True
                )
            ]

    whole = client.post(path, json=ask).json()["choices"][0]["logprobs"]
    with client.stream("POST", path, json={**ask, "stream": True}) as answer:
        chunks = [
            json.loads(line.removeprefix("data: "))
            for line in answer.iter_lines()
            if line and "[DONE]" not in line
        ]
    parts = [
        choice["logprobs"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice.get("logprobs")
    ]
    assert join(parts) == join([whole]) and len(join([whole])) == 7 + 3 * ("chat" not in path)
    if "chat" in path:
        assert all(
            len(one["top_logprobs"]) == 2 and bytes(one["bytes"]).decode() == one["token"]
            for one in whole["content"]
        )


def test_strategies_that_write_other_texts_have_no_logprobs(served, monkeypatch):
    client, *_ = served
    monkeypatch.setitem(STRATEGIES, "fixed", Fixed(2))
    answer = client.post(
        "/v1/completions", json={"prompt": "a", "strategy": "fixed", "logprobs": 1}
    )
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("logprobs: ")


def test_a_text_of_no_new_tokens(served):
    client, *_ = served
    whole = client.post(
        "/v1/completions", json={"prompt": "abc", "max_tokens": 0, "echo": True}
    ).json()
    assert whole["choices"][0]["text"] == "abc" and whole["choices"][0]["finish_reason"] == "length"
    with client.stream(
        "POST", "/v1/completions", json={"prompt": "abc", "max_tokens": 0, "stream": True}
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert (
        json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        and lines[-1] == "data: [DONE]"
    )


def test_models_by_name(served):
    client, *_ = served
    listed, *_ = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/tiny").json() == listed
    missing = client.get("/v1/models/an/other")
    assert missing.status_code == 404 and missing.json()["error"]["param"] == "model"


def test_half_of_a_utf_16_pair_is_refused_in_every_field(served):
    client, *_ = served
    for path, body, field in (
        ("completions", '{"prompt":"a\\ud83d"}', "prompt"),
        ("completions", '{"prompt":"a","\\ud83d":1}', "\ud83d"),
        ("chat/completions", '{"messages":[{"role":"user","content":"\\ud83d"}]}', "messages"),
    ):
        answer = client.post(
            f"/v1/{path}", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field


def test_only_the_beginning_of_a_far_too_long_text_is_encoded(served, monkeypatch):
    client, writer, _ = served
    lengths = []
    encode = writer.encode

    def counted(text: str) -> list[int]:
        lengths.append(len(text))
        return encode(text)

    monkeypatch.setattr(writer, "encode", counted)
    for path, body in (
        ("completions", {"prompt": "a" * 500_000}),
        ("completions", {"prompt": ["b", "a" * 500_000]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 500_000}]}),
    ):
        answer = client.post(f"/v1/{path}", json=body)
        error = answer.json()["error"]
        assert (
            answer.status_code == 400
            and "500000 characters" in error["message"]
            and error["param"] in ("prompt", "messages")
        )
    assert max(lengths) < 10_000
