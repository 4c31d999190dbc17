"""SIGKILL of clients at each moment of a request, of a server under load, and SIGTERM's limit."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lab.reliability.soak.client import head_of
from lab.reliability.soak.model import CONTEXT, write_soaked_model
from lab.reliability.soak.served import Served
from tests.support.served_models import counts_of, served, wait_for_counts

pytest.importorskip("uvicorn", reason="serving is an extra")
pytest.importorskip("prometheus_client", reason="counts of a server need it")
PATIENCE = 60
IDLE = {
    "requests_waiting": 0,
    "requests_running": 0,
    "texts_waiting": 0,
    "texts_running": 0,
    "cache_bytes_running": 0,
}
CLIENT = """\
import socket, sys, time
port, reads = map(int, sys.argv[1:])
client = socket.create_connection(("127.0.0.1", port))
client.sendall(sys.stdin.buffer.read())
while reads and b"data: " not in client.recv(1 << 16):
    pass
print("ready", flush=True)
time.sleep(3600)
"""
SMALL = {"prompt": "the cat", "max_tokens": 3, "temperature": 0}
LONG = {"prompt": ["a"] * 16, "n": 16, "max_tokens": CONTEXT - 24, "temperature": 1}
"""A request that no machine answers within the time of a test."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_soaked_model(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def server(model) -> Iterator[Served]:
    with served(model, "--max-num-seqs", 2, "--prefill-tokens", 1) as one:
        yield one


def request_of(**fields: object) -> bytes:
    body = json.dumps(fields).encode()
    return head_of("/v1/completions", len(body), {"Content-Type": "application/json"}) + body


def fire(server: Served, **fields: object) -> socket.socket:
    """Return a connection on which a completion was requested and not read."""
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(request_of(**fields))
    return client


def everything(client: socket.socket) -> bytes:
    """Return what arrives on a connection until it ends, in whatever way."""
    client.settimeout(PATIENCE)
    received = b""
    with client, suppress(ConnectionError):
        while part := client.recv(1 << 16):
            received += part
    return received


def text_of(answer: bytes) -> str:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"]


def start_client(server: Served, sent: bytes, reads: bool = False) -> subprocess.Popen:
    """Start a client that sends bytes and waits, once it has read a first event if it should."""
    client = subprocess.Popen(
        [sys.executable, "-IS", "-c", CLIENT, f"{server.port}", f"{int(reads)}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    client.stdin.write(sent)
    client.stdin.close()
    assert select.select([client.stdout], [], [], PATIENCE)[0]
    assert client.stdout.readline() == b"ready\n"
    return client


def kill(client: subprocess.Popen) -> None:
    client.kill()
    client.wait()
    client.stdout.close()


def check_still_serves(server: Served, files: int, text: str) -> None:
    """Check that nothing is left of the killed client, and that others are answered as before."""
    wait_for_counts(server, **IDLE)
    until = time.monotonic() + PATIENCE
    while (left := server.usage().files) > files:
        assert time.monotonic() < until, f"{left} open files, {files} before"
        time.sleep(0.02)
    assert text_of(everything(fire(server, **SMALL))) == text


WHOLE = request_of(prompt="the cat", max_tokens=CONTEXT - 24, temperature=0, stream=True)
MOMENTS = {
    "connected": b"",
    "half a header": WHOLE[:40],
    "half a body": WHOLE[:-20],
    "queued": WHOLE,
    "prompt being read": request_of(prompt=[5] * (CONTEXT - 9), max_tokens=8, stream=True),
    "streaming": WHOLE,
    "finished, unread": request_of(**SMALL),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_client_is_killed(server, moment):
    text = text_of(everything(fire(server, **SMALL)))
    before, files = wait_for_counts(server, **IDLE), server.usage().files
    blockers = [fire(server, **LONG)] if moment == "queued" else []
    if blockers:
        wait_for_counts(server, texts_running=2)
    client = start_client(server, MOMENTS[moment], reads=moment == "streaming")
    cancelled = 1 + len(blockers)
    if moment == "queued":
        wait_for_counts(server, requests_waiting=1)
    elif moment == "prompt being read":
        now = wait_for_counts(server, texts_running=1)
        assert now["generated_tokens"] == before["generated_tokens"]
    elif moment == "finished, unread":
        wait_for_counts(server, requests_finished=before["requests_finished"] + 1)
    if moment not in ("queued", "prompt being read", "streaming"):
        cancelled = 0
    kill(client)
    if moment == "queued":
        wait_for_counts(server, requests_waiting=0, texts_running=2)
    for blocker in blockers:
        blocker.close()
    check_still_serves(server, files, text)
    after = counts_of(server)
    assert after["requests_cancelled"] - before["requests_cancelled"] == cancelled
    assert after["requests_failed"] == before["requests_failed"]


def test_a_server_is_killed_under_load(model):
    """Every client sees the end of its connection at once, whatever it waits for."""
    with served(model, "--max-num-seqs", 2) as server:
        clients = [fire(server, **LONG, stream=number % 2 == 0) for number in range(8)]
        clients += [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        assert clients[0].recv(1 << 16), "a text is being sent"
        os.kill(server.pid, signal.SIGKILL)
        began = time.monotonic()
        for client in clients:
            assert b"[DONE]" not in everything(client)
        assert time.monotonic() - began < 5, "0.01 s on an idle machine"
        server.process.wait(PATIENCE)


def test_a_server_that_is_stopped_ends_texts_within_its_limit(model):
    seconds = 3
    with served(model, "--max-num-seqs", 3, "--shutdown-timeout", seconds) as server:
        short = fire(server, prompt="the cat", max_tokens=400, temperature=0, stream=True)
        received = short.recv(1 << 16)
        stream = fire(server, **LONG, stream=True)
        assert received and stream.recv(1 << 16)
        others = [fire(server, **LONG), fire(server, **LONG), fire(server, **LONG, stream=True)]
        until = time.monotonic() + PATIENCE
        while sum(counts_of(server)[name] for name in ("requests_waiting", "requests_running")) < 4:
            assert time.monotonic() < until
        began = time.monotonic()
        server.process.terminate()
        received += everything(short)
        first, *rest = [everything(client) for client in (stream, *others)]
        status = server.process.wait(PATIENCE)
        took = time.monotonic() - began
    assert status == 0 and took < seconds + 3, "a busy machine may need a moment more"
    assert b"[DONE]" in received and b"is stopping" not in received, "a short text is completed"
    assert all(b"the server is stopping" in one for one in (first, *rest))
    assert b"[DONE]" not in first and all(b"503 Service Unavailable" in one for one in rest[:2])
    assert "Traceback" not in server.log.read_text()
