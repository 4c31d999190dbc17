"""Many clients at once that leave early, send too much or cause errors: none delays the others."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="serving is an extra")
from fastapi.testclient import TestClient

from megatron_sorted.decoding.strategies import Full, SamplingParameters
from megatron_sorted.decoding.text_generator import StreamedText, TextGenerator
from megatron_sorted.decoding.texts import AddedTokens
from megatron_sorted.errors import MemoryExhaustedError
from megatron_sorted.serving import body
from megatron_sorted.serving.api import make_app
from megatron_sorted.serving.job import Job
from megatron_sorted.serving.worker import MAX_WAITING, GenerationWorker
from tests.support.decoding import plain_network
from tests.unit.test_decoding_server import NamedLetters as Letters

PATIENCE = 60
"""Seconds after which a test says that something never came."""


class Gated:
    """A replacement of `writing`: texts of five pieces, each of which waits for the test."""

    def __init__(self):
        self.turns, self.written = threading.Semaphore(0), []

    def __call__(self, request, *_):
        for number in range(5):
            assert self.turns.acquire(timeout=PATIENCE)
            self.written.append(len(request.prompts[0]))
            finish = "length" if number == 4 else None
            yield StreamedText(
                0, [(f"<{number}>", 4)], AddedTokens(0, [number], [4], 0, 0, finish), finish
            )


@pytest.fixture
def gated(monkeypatch):
    """Return a worker whose pieces wait for a gate, and the gate."""
    writer = TextGenerator(plain_network("llama")[1], Letters())
    gate = Gated()
    monkeypatch.setattr(writer, "writing", gate)
    worker = GenerationWorker(writer)
    yield worker, gate
    gate.turns.release(1000)
    worker.close()


class Client:
    """One request to an application, without a network."""

    def __init__(self, app, **body):
        self.disconnected, self.texts, self.status = asyncio.Event(), "", None
        self.body, self.begun, self.headers = (
            json.dumps({"max_tokens": 5, **body}).encode(),
            False,
            {},
        )
        self.task = asyncio.create_task(
            app(
                {
                    "type": "http",
                    "method": "POST",
                    "path": "/v1/completions",
                    "query_string": b"",
                    "root_path": "",
                    "headers": [(b"content-type", b"application/json")],
                    "asgi": {"version": "3.0", "spec_version": "2.3"},
                    "scheme": "http",
                    "http_version": "1.1",
                    "server": ("a", 80),
                    "client": ("b", 1),
                },
                self.receive,
                self.send,
            )
        )

    async def receive(self) -> dict:
        if not self.begun:
            self.begun = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.status = message.get("status", self.status)
        self.headers |= dict(message.get("headers", []))
        self.texts += message.get("body", b"").decode()


async def until(holds) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)


async def busy(worker) -> tuple:
    """Return a server whose worker is busy with a first client's request, and that client."""
    app = make_app(worker, "tiny", lambda name: Full())
    first = Client(app, prompt="a")
    await until(lambda: not worker.waiting and worker.runs and first.begun)
    return app, first


def test_a_text_streams_while_more_clients_wait_than_there_are_threads(gated):
    worker, gate = gated

    async def scene() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        app = make_app(worker, "tiny", lambda name: Full())
        first = Client(app, prompt="a", stream=True)
        gate.turns.release()
        await until(lambda: "<0>" in first.texts)
        others = [Client(app, prompt="bc") for _ in range(8)]
        await until(lambda: len(worker.waiting) == 8)
        for number in range(1, 5):
            gate.turns.release()
            await until(lambda number=number: f"<{number}>" in first.texts)
        gate.turns.release(40)
        await asyncio.wait_for(asyncio.gather(*(other.task for other in others)), PATIENCE)
        assert all(other.status == 200 and "<0><1><2><3><4>" in other.texts for other in others)

    asyncio.run(scene())


def test_clients_that_leave_while_waiting_free_their_place_at_once(gated):
    worker, gate = gated

    async def scene() -> None:
        app, first = await busy(worker)
        waiting = [
            Client(app, prompt="bcd", stream=bool(number % 2)) for number in range(MAX_WAITING)
        ]
        await until(lambda: len(worker.waiting) == MAX_WAITING)
        late = Client(app, prompt="bcd")
        await until(lambda: late.status)
        assert late.status == 503 and f"{MAX_WAITING} requests wait already" in late.texts
        assert 1 <= int(late.headers[b"retry-after"]) <= 60
        for client in waiting:
            client.disconnected.set()
        await until(lambda: not len(worker.waiting))
        await asyncio.wait_for(asyncio.gather(*(client.task for client in waiting)), PATIENCE)
        new = Client(app, prompt="bc")
        gate.turns.release(10)
        await asyncio.wait_for(asyncio.gather(first.task, new.task), PATIENCE)
        assert "<4>" in first.texts and new.status == 200 and gate.written == [2] * 5 + [3] * 5, (
            "of those that waited none was written for"
        )

    asyncio.run(scene())


def test_a_client_that_leaves_before_its_stream_begins_ends_its_job(gated):
    worker, _ = gated

    async def scene() -> None:
        app, first = await busy(worker)
        client = Client(app, prompt="bcd", stream=True)
        client.disconnected.set()  # the response has no receiver
        await asyncio.wait_for(client.task, PATIENCE)
        await until(lambda: not len(worker.waiting))
        first.task.cancel()

    asyncio.run(scene())


def test_a_stopped_worker_sends_errors_to_running_and_waiting_clients(gated):
    worker, gate = gated

    async def scene() -> None:
        app, first = await busy(worker)
        stream, whole = Client(app, prompt="bc", stream=True), Client(app, prompt="bc")
        await until(lambda: len(worker.waiting) == 2)
        worker.stop()
        await asyncio.wait_for(asyncio.gather(first.task, stream.task, whole.task), PATIENCE)
        assert [first.status, stream.status, whole.status] == [503, 200, 503]
        assert all("the server is stopping" in client.texts for client in (first, stream, whole))
        refused = Client(app, prompt="bc")
        await asyncio.wait_for(refused.task, PATIENCE)
        assert refused.status == 503 and b"retry-after" in refused.headers

    asyncio.run(scene())
    gate.turns.release(5)
    assert worker.close(PATIENCE) and gate.written == [2], "the text ended at its next piece"


def test_a_worker_outlives_the_loop_of_its_clients(gated):
    worker, gate = gated

    async def scene() -> None:
        Client(make_app(worker, "tiny", lambda name: Full()), prompt="a", stream=True)
        await until(lambda: worker.runs and worker.thread.is_alive())

    asyncio.run(scene())
    gate.turns.release(5)
    behind = worker.submit(Job([[1]], Full(), SamplingParameters(), 5, []))
    gate.turns.release(5)
    assert len(list(behind.results())) == 5


def test_a_body_that_is_too_large_is_read_to_its_end_but_not_kept(gated, monkeypatch):
    worker, gate = gated
    gate.turns.release(5)
    monkeypatch.setattr(body, "LEAST_BODY_BYTES", 1000)
    monkeypatch.setattr(body, "BYTES_PER_TOKEN", 0)
    with TestClient(make_app(worker, "tiny", lambda name: Full())) as client:
        kind = {"content-type": "application/json"}
        whole = json.dumps({"prompt": "a" * 2000}).encode()
        for content in (whole, iter([whole[:600], whole[600:]])):
            answer = client.post("/v1/completions", content=content, headers=kind)
            assert (
                answer.status_code == 413
                and "more than 1000 bytes" in answer.json()["error"]["message"]
            )
        assert (
            client.post("/v1/completions", json={"prompt": "a", "max_tokens": 5}).status_code == 200
        )


@pytest.mark.parametrize(
    ("error", "is_shown"),
    [(RuntimeError("broken"), True), (MemoryExhaustedError("out of memory."), False)],
)
def test_a_failure_keeps_no_memory_and_one_of_the_program_is_shown(
    gated, monkeypatch, capsys, error, is_shown
):
    worker, _ = gated

    def fail(*_):
        try:
            raise ValueError("first")
        except ValueError as first:
            raise error from first

    monkeypatch.setattr(worker.generator, "writing", fail)
    output = worker.submit(Job([[1]], Full(), SamplingParameters(), 5, [])).outputs.get(
        timeout=PATIENCE
    )
    assert output is error
    assert (output.__traceback__, output.__cause__, output.__context__) == (None, None, None), (
        "frames hold the tensors of the text"
    )
    assert ("in fail" in capsys.readouterr().err) is is_shown
