"""What an operator sees of requests: ids, one line of log for each, metrics; and the page at /."""

import asyncio
import base64
import hashlib
import logging
import os
import re
import time
from html.parser import HTMLParser
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

pytest.importorskip("fastapi", reason="serving is an extra")
from fastapi.testclient import TestClient

from megatron_sorted.decoding import text_generator as text_generator_module
from megatron_sorted.decoding.strategies import Full, SelfSpeculative
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.serving import metrics as metrics_module
from megatron_sorted.serving import page as page_module
from megatron_sorted.serving.api import make_app
from megatron_sorted.serving.keys import ApiKeys
from megatron_sorted.serving.request_log import (
    LOG,
    ReadyStreamHandler,
    RecordRequests,
    RequestRecord,
    log_request,
    write_request_log,
)
from megatron_sorted.serving.worker import GenerationWorker
from tests.support.decoding import plain_network
from tests.unit.test_decoding_connections import Client, until
from tests.unit.test_decoding_server import NamedLetters

KEY = "secret-key-0123456789"
HEADERS = {"authorization": f"Bearer {KEY}"}
ASK = {"prompt": "a prompt", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def served(caplog):
    """Return a client of a server with one key, the jobs of its worker, and the log."""
    caplog.set_level(logging.INFO, LOG.name)
    worker, jobs = GenerationWorker(TextGenerator(plain_network()[1], NamedLetters())), []
    submit = worker.submit
    worker.submit = lambda job: (jobs.append(job), submit(job))[1]
    app = make_app(worker, "tiny", lambda _: Full(), keys=ApiKeys([f"alice {KEY}"], "keys"))
    with TestClient(app) as client:
        yield client, jobs, caplog
    worker.close()


def fields_of(line: str) -> dict[str, str]:
    return dict(field.split("=", 1) for field in line.split(" "))


def test_a_clients_id_is_returned_and_names_the_job(served):
    client, jobs, log = served
    for number, stream in enumerate((False, True)):
        headers = {**HEADERS, "x-request-id": f"mine-{number}"}
        answer = client.post("/v1/completions", json={**ASK, "stream": stream}, headers=headers)
        assert answer.status_code == 200 and answer.headers["x-request-id"] == f"mine-{number}"
        assert jobs[-1].id == f"mine-{number}"
        assert fields_of(log.messages[-1])["id"] == f"mine-{number}"


@pytest.mark.parametrize("given", [None, "", "a b", "a\tb", "x" * 129, b"\xc3\xa4", b"a\x7f"])
def test_other_ids_are_replaced_by_new_ones(served, given):
    client, jobs, log = served
    more = {} if given is None else {"x-request-id": given}
    ids = {
        client.post("/v1/completions", json=ASK, headers={**HEADERS, **more}).headers[
            "x-request-id"
        ]
        for _ in range(2)
    }
    assert len(ids) == 2 and all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
    assert {job.id for job in jobs} == {fields_of(line)["id"] for line in log.messages} == ids


def test_errors_have_an_id_too(served):
    client, *_ = served
    for answer in (
        client.get("/nowhere", headers={"x-request-id": "me"}),
        client.get("/v1/models", headers={"x-request-id": "me"}),
        client.post("/v1/completions", content=b"{", headers={**HEADERS, "x-request-id": "me"}),
    ):
        assert answer.status_code in (400, 401, 404) and answer.headers["x-request-id"] == "me"


def test_the_log_says_what_a_request_used_and_nothing_of_its_text(served):
    client, jobs, log = served
    client.post("/v1/completions", json={**ASK, "n": 2, "user": "someone"}, headers=HEADERS)
    jobs[-1].cached_tokens = 3  # too late for this line
    [line] = log.messages
    fields = fields_of(line)
    assert float(fields.pop("first")) <= float(fields.pop("seconds")) < 60
    assert re.fullmatch("[0-9a-f]{32}", fields.pop("id"))
    assert fields == {
        "method": "POST",
        "path": "/v1/completions",
        "status": "200",
        "end": "complete",
        "key": "alice",
        "prompt": "9",
        "new": "8",
        "cached": "0",
    }
    assert not any(word in line for word in (KEY, "prompt ", "someone"))


def test_refused_requests_and_odd_paths_are_one_line_each(served):
    client, _, log = served
    client.post("/v1/completions", json={**ASK, "n": 99}, headers=HEADERS)
    client.post("/v1/completions", json=ASK)
    client.get("/a%0Ab%20status=200%1b[2J?key=" + KEY)
    client.get("/" + "long" * 99)
    lines = [fields_of(line) for line in log.messages]
    assert [line["status"] for line in lines] == ["400", "401", "404", "404"]
    assert [line["key"] for line in lines] == ["alice", "-", "-", "-"]
    assert lines[2]["path"] == "/a%0Ab%20status%3D200%1B%5B2J" and len(lines[3]["path"]) == 200
    assert not any("new" in line for line in lines)


def test_polls_are_logged_only_when_they_fail(served, monkeypatch):
    client, _, log = served
    monkeypatch.setattr(metrics_module, "prometheus_client", None)
    client.get("/health")
    assert log.messages == []
    client.post("/health")
    assert [fields_of(line)["status"] for line in log.messages] == ["405"]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_worker_are_named(served, monkeypatch, stream):
    client, _, log = served
    monkeypatch.setattr(text_generator_module, "start_batch", Mock(side_effect=MemoryError()))
    answer = client.post("/v1/completions", json={**ASK, "stream": stream}, headers=HEADERS)
    fields = fields_of(log.messages[-1])
    assert fields["end"] == "MemoryExhaustedError" and fields["new"] == "0"
    assert fields["status"] == str(answer.status_code) == ("200" if stream else "503")


def test_a_client_that_leaves_is_logged_as_that(caplog):
    caplog.set_level(logging.INFO, LOG.name)
    worker = GenerationWorker(TextGenerator(plain_network()[1], NamedLetters()))
    worker.submit = lambda job: job  # its texts never come

    async def scene() -> None:
        app = make_app(worker, "tiny", lambda _: Full())
        clients = [Client(app, prompt="a"), Client(app, prompt="a", stream=True)]
        await until(lambda: all(one.begun for one in clients))
        await asyncio.sleep(0)
        for one in clients:
            one.disconnected.set()
        clients[0].task.cancel()
        await asyncio.gather(*(one.task for one in clients), return_exceptions=True)

    asyncio.run(scene())
    assert [fields_of(line)["end"] for line in caplog.messages] == ["disconnected"] * 2
    worker.close()


def test_the_log_goes_to_standard_error_with_times_in_utc(capfd, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    handlers, LOG.handlers = LOG.handlers, []
    try:
        write_request_log()
        record = RequestRecord("me", "GET", "/v1/models")
        record.status, record.is_complete = 200, True
        record.ended_at = record.began_at + 1.5
        before = time.time()
        log_request(record)
    finally:
        LOG.handlers, LOG.propagate = handlers, True
        LOG.setLevel(logging.NOTSET)
        monkeypatch.undo()
        time.tzset()
    printed = capfd.readouterr()
    moment, line = printed.err.rstrip("\n").split(" ", 1)
    assert line == ("id=me method=GET path=/v1/models status=200 end=complete key=- seconds=1.500")
    assert moment[:13] == time.strftime("%Y-%m-%dT%H", time.gmtime(before))
    assert re.fullmatch(r"[0-9-]{10}T[0-9:]{8}\.\d{3}Z", moment) and printed.out == ""


def test_a_log_that_nobody_reads_delays_no_client(capfd):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # a write that would wait is an error here
    with open(reader, "rb", 0) as read_end, open(writer, "w") as stream:
        handler = ReadyStreamHandler(stream)
        line = logging.LogRecord("a", logging.INFO, "", 0, "x" * 400, None, None)
        for _ in range(1000):  # more than a pipe holds
            handler.emit(line)
        unread = read_end.read(1 << 20)
        assert 0 < len(unread) < 401 * 1000 and unread == (b"x" * 400 + b"\n") * (
            len(unread) // 401
        )
        handler.emit(line)
        assert len(read_end.read(1 << 20)) == 401
    handler.emit(line)  # the stream is closed
    assert capfd.readouterr().err == "", "logging prints errors of writing"


def test_without_the_log_nothing_is_printed(capfd):
    worker = GenerationWorker(TextGenerator(plain_network()[1], NamedLetters()))
    with TestClient(make_app(worker, "tiny", lambda _: Full())) as client:
        assert client.get("/v1/models").status_code == 200
    worker.close()
    assert capfd.readouterr().err == ""


def test_failures_of_the_application_are_recorded():
    ended = []

    async def broken(scope, receive, send):
        raise RuntimeError("broken")

    async def scene() -> None:
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        await RecordRequests(broken, ended.append)(scope, None, None)

    with pytest.raises(RuntimeError):
        asyncio.run(scene())
    assert [(one.status, one.is_complete) for one in ended] == [(500, False)]


def record_of(path: str = "/v1/completions", status: int = 200, usage=None) -> RequestRecord:
    """Return a record of a request that took 3 s."""
    record = RequestRecord("me", "POST", path, lambda: 100.0)
    record.status, record.usage, record.ended_at = status, usage, 103.0
    return record


def samples_of(text: str) -> dict[str, float]:
    """Return the samples of the text format, by an own reader of it."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_hold_the_workers_counts_and_what_clients_saw():
    pytest.importorskip("prometheus_client", reason="serving is an extra")
    worker = SimpleNamespace(counts=metrics_module.BatchingCounts())
    metrics = metrics_module.Metrics(worker)
    for number, one in enumerate(vars(worker.counts), 1):
        setattr(worker.counts, one, number)
    usage = SimpleNamespace(
        first_at=100.2, depths={2: 5, 4: 1}, seconds_per_token=lambda: [0.015, 0.3]
    )
    metrics.observe(record_of(usage=usage))
    metrics.observe(record_of("/v1/completions", 503))
    metrics.observe(record_of("/v1/models/a", 404))
    metrics.observe(record_of("/b", 404))
    response = metrics.response()
    samples = samples_of(response.body.decode())
    for number, one in enumerate(vars(worker.counts), 1):
        suffix = "" if one in metrics_module.GAUGES else "_total"
        assert samples[f"megatron_sorted_{one}{suffix}"] == number
    expected = {
        'responses_total{path="/v1/completions",status="200"}': 1,
        'responses_total{path="/v1/completions",status="503"}': 1,
        'responses_total{path="other",status="404"}': 2,
        'tokens_by_depth_total{depth="2"}': 5,
        'tokens_by_depth_total{depth="4"}': 1,
        'time_to_first_token_seconds_bucket{le="0.1"}': 0,
        'time_to_first_token_seconds_bucket{le="0.25"}': 1,
        "time_to_first_token_seconds_count": 1,
        'time_per_output_token_seconds_bucket{le="0.02"}': 1,
        "time_per_output_token_seconds_count": 2,
        "time_per_output_token_seconds_sum": 0.315,
        "request_seconds_count": 1,
        "request_seconds_sum": 3,
    }
    for name, value in expected.items():
        assert samples[f"megatron_sorted_{name}"] == pytest.approx(value), name
    assert samples["process_resident_memory_bytes"] > 0
    assert response.headers["content-type"].startswith("text/plain; version=")


def test_metrics_are_served_of_this_server_alone():
    parser = pytest.importorskip("prometheus_client.parser", reason="serving is an extra")
    for _ in range(2):  # a second server in one process starts at 0
        worker = GenerationWorker(TextGenerator(plain_network()[1], NamedLetters()))
        strategy = SelfSpeculative(2, 4)
        with TestClient(make_app(worker, "tiny", lambda _, one=strategy: one)) as client:
            usage = client.post("/v1/completions", json=ASK).json()["usage"]
            answer = client.get("/metrics")
        worker.close()
        families = list(parser.text_string_to_metric_families(answer.text))
        assert all(family.documentation for family in families)
        assert not any(family.name.endswith("_created") for family in families)
        by_depth = {
            sample.labels["depth"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == "megatron_sorted_tokens_by_depth_total"
        }
        assert by_depth == usage["depths"]


def test_every_count_has_one_description():
    names = set(vars(metrics_module.BatchingCounts()))
    assert names == {*metrics_module.GAUGES, *metrics_module.COUNTERS}
    assert not set(metrics_module.GAUGES) & set(metrics_module.COUNTERS)


def test_without_its_library_only_the_metrics_are_missing(served, monkeypatch):
    monkeypatch.setattr(metrics_module, "prometheus_client", None)
    worker = GenerationWorker(TextGenerator(plain_network()[1], NamedLetters()))
    with TestClient(make_app(worker, "tiny", lambda _: Full())) as client:
        assert client.post("/v1/completions", json=ASK).status_code == 200
        answer = client.get("/metrics")
        assert answer.status_code == 501 and "pip install" in answer.json()["error"]["message"]
    worker.close()


class Blocks(HTMLParser):
    """Collects the text of a page's scripts and styles, and what it would load."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=False)
        self.open, self.blocks, self.loaded, self.inline = None, [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.open = tag if tag in ("script", "style") else None
        for name, value in attributes:
            if name in ("src", "srcset", "data", "action") or (name, tag) == ("href", "link"):
                self.loaded.append(value)
            if name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open:
            self.blocks.append((self.open, data))


def test_the_page_runs_its_own_scripts_and_styles_alone(served):
    client, *_ = served
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "megatron_sorted" in answer.text and answer.headers["cache-control"] == "no-cache"
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    blocks = Blocks(answer.text)
    assert all(one.startswith("data:") for one in blocks.loaded), "nothing comes from elsewhere"
    assert blocks.inline == [], "the policy forbids them"
    for kind in ("script", "style"):
        hashes = [
            base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            for one, text in blocks.blocks
            if one == kind
        ]
        sources = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
        assert policy[f"{kind}-src"] == sources


def test_the_policy_of_a_page_with_scripts():
    page = "<style>\na {}\n</style><SCRIPT type='module'>1 < 2\n</SCRIPT><script></script>"
    policy = page_module.policy_of(page)
    digests = [
        base64.b64encode(hashlib.sha256(text).digest()).decode()
        for text in (b"\na {}\n", b"1 < 2\n", b"")
    ]
    assert f"style-src 'sha256-{digests[0]}';" in policy
    assert f"script-src 'sha256-{digests[1]}' 'sha256-{digests[2]}';" in policy


def test_no_other_origin_may_ask(served):
    client, *_ = served
    headers = {"origin": "https://other.example", "access-control-request-method": "POST"}
    answers = [client.options("/v1/completions", headers=headers), client.get("/", headers=headers)]
    assert answers[0].status_code == 405
    assert not any("access-control" in name for one in answers for name in one.headers)
