"""Each request may choose a depth or a confidence; the usage says what its texts have used."""

import json

import pytest

pytest.importorskip("fastapi", reason="serving is an extra")
from fastapi.testclient import TestClient

from megatron_sorted.conversion.hugging_face.nested_exits import NestedExit
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.requested_strategy import check_strategy
from megatron_sorted.decoding.strategies import EarlyExit, Full, SelfSpeculative
from megatron_sorted.decoding.text_generator import StreamedText, TextGenerator
from megatron_sorted.decoding.texts import AddedTokens, Limits
from megatron_sorted.serving.api import make_app
from megatron_sorted.serving.job import Job
from megatron_sorted.serving.usage import Usage
from megatron_sorted.serving.worker import GenerationWorker
from tests.support.decoding import continue_greedily, last_logits, plain_network
from tests.support.model_directories import family_model
from tests.unit.test_decoding_server import NamedLetters

NAMED = {None: SelfSpeculative(2, 4), "full": Full(), "early_exit": EarlyExit((2,), (0.9,))}
GREEDY = {"prompt": "hello", "max_tokens": 12, "temperature": 0}


@pytest.fixture
def served():
    """Return a client of a server, and its worker."""
    network = plain_network()[1]
    worker = GenerationWorker(TextGenerator(network, NamedLetters()))

    def strategy_of(name):
        strategy = NAMED[name]
        check_strategy(strategy, network)
        return strategy

    with TestClient(make_app(worker, "tiny", strategy_of)) as client:
        yield client, worker
    worker.close()


def completion(client: TestClient, **more) -> dict:
    answer = client.post("/v1/completions", json={**GREEDY, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events_of(client: TestClient, path: str, **body) -> list[dict]:
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        return [
            json.loads(line.removeprefix("data: "))
            for line in answer.iter_lines()
            if line and "[DONE]" not in line
        ]


def text_at(depth: int, count: int = 12) -> str:
    """Return the expected text of an exit, by transformers' own model of fewer layers."""
    case, letters = plain_network()[0], NamedLetters()
    ids = continue_greedily(
        letters.encode_prompt("hello"), count, lambda text: last_logits(case, depth, text)
    )
    return letters.decode(ids)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_depth_writes_the_text_of_the_model_cut_there(served, depth):
    client, _ = served
    for more in ({"depth": depth}, {"model": f"tiny@{depth}"}):
        answer = completion(client, **more)
        assert answer["choices"][0]["text"] == text_at(depth)
        assert answer["usage"]["depths"] == {str(depth): 12}
        assert answer["usage"]["completion_tokens_details"] == {
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        }
        assert answer["model"] == more.get("model", "tiny")
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "depth": depth}
    answer = client.post("/v1/chat/completions", json=chat).json()
    assert answer["usage"]["depths"] == {str(depth): 5}


def test_the_texts_of_the_depths_differ():
    assert len({text_at(depth) for depth in (1, 2, 3, 4)}) == 4


def test_requests_without_a_depth_have_the_servers_strategy(served):
    client, _ = served
    usage = completion(client, prompt="hello")["usage"]
    drafted = usage["completion_tokens_details"]
    assert drafted["accepted_prediction_tokens"] == usage["depths"].get("2", 0) > 0
    assert sum(usage["depths"].values()) == 12


@pytest.mark.parametrize("confidence", [0.0, 0.3, 1.0])
def test_a_confidence_is_the_threshold_of_every_exit(served, confidence):
    client, worker = served
    network, generator = worker.generator.network, worker.generator
    strategy = EarlyExit((1, 2, 3), (confidence,) * 3)
    [expected] = generate(network, [generator.encode("hello")], strategy, limits=Limits(12))
    for more in ({}, {"strategy": "early_exit"}):
        answer = completion(client, confidence=confidence, **more)
        assert answer["choices"][0]["text"] == generator.tokenizer.decode(expected.tokens)
        assert sum(answer["usage"]["depths"].values()) == 12
        counts = {
            str(one): expected.counts.depths.count(one) for one in set(expected.counts.depths)
        }
        assert answer["usage"]["depths"] == counts
    if confidence == 0:
        assert answer["usage"]["depths"] == {"1": 12}


@pytest.mark.parametrize(
    ("more", "field", "words"),
    [
        ({"depth": 5}, "depth", "5 is no exit of this model. Use one of 1, 2, 3, 4."),
        ({"depth": 0}, "depth", "0 is no exit"),
        ({"depth": -(10**30)}, "depth", "is no exit"),
        ({"depth": "2"}, "depth", "integer"),
        ({"depth": True}, "depth", "integer"),
        ({"depth": 2.5}, "depth", "integer"),
        ({"confidence": 1.5}, "confidence", "less than or equal to 1"),
        ({"confidence": -0.1}, "confidence", "greater than or equal to 0"),
        ({"confidence": "high"}, "confidence", "number"),
        ({"depth": 2, "strategy": "full"}, "strategy", "contradicts depth 2"),
        ({"depth": 4, "strategy": "fixed"}, "strategy", "contradicts depth 4"),
        ({"depth": 2, "strategy": "early_exit"}, "strategy", "contradicts depth 2"),
        ({"model": "tiny@2", "depth": 4}, "depth", "4 is not that of the model 'tiny@2'"),
        ({"model": "tiny@2", "strategy": "full"}, "strategy", 'contradicts model "tiny@2"'),
        ({"model": "tiny@2", "confidence": 0.5}, "confidence", "model names one depth"),
        ({"depth": 2, "confidence": 0.5}, "confidence", "depth names one depth"),
        ({"confidence": 0.5, "strategy": "full"}, "strategy", "contradicts confidence 0.5"),
        ({"depth": 2, "logprobs": 1}, "depth", "logprobs: "),
        ({"model": "tiny@2", "logprobs": 1}, "model", "logprobs: "),
        ({"confidence": 0.5, "logprobs": 1}, "confidence", "logprobs: "),
    ],
)
def test_contradictions_and_unknown_depths_are_refused_by_field(served, more, field, words):
    client, _ = served
    answer = client.post("/v1/completions", json={**GREEDY, **more})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field and words in error["message"]


@pytest.mark.parametrize("name", ["tiny@5", "tiny@", "tiny@02", "tiny@2@2", "tin@2", "@2"])
def test_unknown_names_are_not_found(served, name):
    client, _ = served
    for answer in (
        client.post("/v1/completions", json={**GREEDY, "model": name}),
        client.get(f"/v1/models/{name}"),
    ):
        error = answer.json()["error"]
        assert answer.status_code == 404 and error["param"] == "model"
        assert "@1, @2, @3, @4" in error["message"]


def test_what_agrees_is_accepted(served):
    client, _ = served
    for more in (
        {"model": "tiny@2", "depth": 2},
        {"depth": 2, "strategy": "fixed"},
        {"depth": 4, "strategy": "full"},
        {"depth": 4, "logprobs": 1},
        {"depth": None, "confidence": None},
    ):
        completion(client, **more)


def test_every_exit_is_listed_as_a_model(served):
    client, _ = served
    entries = client.get("/v1/models").json()["data"]
    assert [(one["id"], one.get("depth"), one["exits"]) for one in entries] == [
        ("tiny", None, [1, 2, 3, 4]),
        *((f"tiny@{depth}", depth, [1, 2, 3, 4]) for depth in (1, 2, 3, 4)),
    ]
    assert [client.get(f"/v1/models/{one['id']}").json() for one in entries] == entries


def test_a_model_without_exits_has_one_depth_and_no_early_exit():
    model = family_model("llama").requires_grad_(False)
    network = Network(model, {4: NestedExit(model.model.norm, model.lm_head)})
    worker = GenerationWorker(TextGenerator(network, NamedLetters()))
    with TestClient(make_app(worker, "tiny", lambda _: Full())) as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny", "tiny@4"]
        completion(client, depth=4)
        answer = client.post("/v1/completions", json={**GREEDY, "confidence": 0.5})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "confidence"
    worker.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_with_depths_show_the_text_and_exit_of_each_token(served, path):
    client, _ = served
    body = {"max_tokens": 12, "temperature": 0, "confidence": 0.3}
    body |= {"messages": [{"role": "user", "content": "h"}]} if "chat" in path else {"prompt": "h"}
    options = {"include_usage": True, "include_depths": True}
    *events, last = events_of(client, path, stream_options=options, **body)
    parts = [part for event in events for part in event["choices"][0].get("parts", [])]
    for event in events:
        choice = event["choices"][0]
        text = choice["delta"].get("content", "") if "chat" in path else choice["text"]
        assert text == "".join(part for part, _ in choice.get("parts", []))
    counted = {str(one): [depth for _, depth in parts].count(one) for _, one in parts}
    assert last["choices"] == [] and counted == last["usage"]["depths"] and len(parts) == 12
    bare = events_of(client, path, **body)
    assert not any("parts" in event["choices"][0] for event in bare)


def test_depths_in_streams_need_a_stream(served):
    client, _ = served
    answer = client.post(
        "/v1/completions", json={**GREEDY, "stream_options": {"include_depths": True}}
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream_options"


def test_the_usage_of_a_job():
    job, now = Job([[1], [1]], None, None, 9, []), iter((1.0, 2.0, 5.0, 6.0))
    usage = Usage(job, 8, lambda: next(now))
    for row, depths, drafted, accepted in (
        (0, [2, 2, 4], 4, 2),
        (1, [4], 0, 0),
        (0, [2, 4], 4, 1),
        (0, [], 0, 0),
    ):
        added = AddedTokens(row, [7] * len(depths), depths, drafted, accepted, None)
        usage.add(StreamedText(row, [], added, None))
    usage.add([])
    job.cached_tokens, job.layers_run = 14, 99
    assert usage.fields() == {
        "prompt_tokens": 8,
        "completion_tokens": 6,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 8},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 3,
            "rejected_prediction_tokens": 5,
        },
        "layers_run": 99,
        "depths": {"2": 3, "4": 3},
    }
    assert usage.first_at == 1 and usage.error is None
    assert usage.seconds_per_token() == [(5 - 1) / 2], "two tokens after the three that came first"
    usage.add(ValueError("no"))
    assert usage.error == "ValueError"
