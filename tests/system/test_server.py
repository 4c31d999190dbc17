"""A server with idle, slow, leaving and many clients, its stop, and clients of other projects."""

import json
import os
import select
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.serving.public_clients import CLIENTS, Missing, Target
from tests.support.commands import start_command
from tests.support.evaluated import write_model

pytest.importorskip("uvicorn", reason="serving is an extra")
PATIENCE = 240


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("server") / "tiny",
        seed=1,
        num_layers=4,
        max_position_embeddings=512,
    )


@contextmanager
def serving(
    model: Path, *arguments: object, cold: bool = False
) -> Iterator[tuple[subprocess.Popen, int]]:
    """Yield a server that can be reached, and its port; it is ended afterwards."""
    process = start_command(
        "tools/serve.py",
        model.name,
        "--depths",
        1,
        2,
        "--port",
        0,
        *arguments,
        cwd=model.parent,
        cold=cold,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line = ""
        while "http://127.0.0.1:" not in line:  # it is printed when clients can connect
            line = process.stdout.readline()
            assert line, "the server ended"
        yield process, int(line.partition("http://127.0.0.1:")[2].partition("/")[0])
    finally:
        process.kill()
        process.communicate()


def ask(port: int, path: str = "/v1/completions", **body: object) -> dict:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


def fire(port: int, **body: object) -> socket.socket:
    """Return a connection on which a completion was requested and not read."""
    data = json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: "
        b"application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
    )
    return client


def everything(client: socket.socket) -> bytes:
    client.settimeout(PATIENCE)
    received = b""
    try:
        while part := client.recv(1 << 16):
            received += part
    except ConnectionError:
        pass
    client.close()
    return received


def memory_and_cpu(pid: int) -> tuple[float, float]:
    """Return the most memory that a process has had [MB], and its CPU seconds."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024, (
        int(fields[11]) + int(fields[12])
    ) / os.sysconf("SC_CLK_TCK")


def test_idle_and_slow_clients_lock_no_one_out(model):
    with serving(model, cold=True) as (process, port):  # whose memory is its own
        ask(port, prompt="a", max_tokens=2)
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        for number, client in enumerate(idle):
            client.sendall((b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", b"G")[number % 3])
        began = time.monotonic()
        assert ask(port, prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2
        assert ask(port, "/v1/models")["data"] and time.monotonic() - began < 30

        memory, cpu = memory_and_cpu(process.pid)
        bombs = [
            b'{"prompt": [' + b"-1," * 1_000_000 + b"-1]}",
            b'{"prompt": "' + b"a " * (4 << 20) + b'"}',
            b'{"prompt": [' + b"-1," * 100_000 + b"-1]}",
            b'{"prompt": "' + b"a " * 450_000 + b'"}',
        ]
        for bomb in bombs:
            with pytest.raises(urllib.error.HTTPError) as refused:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/completions",
                    bomb,
                    {"content-type": "application/json"},
                )
                urllib.request.urlopen(request, timeout=PATIENCE)
            assert refused.value.code in (400, 413) and len(refused.value.read()) < 500
        memory_after, cpu_after = memory_and_cpu(process.pid)
        assert cpu_after - cpu < 2 and memory_after - memory < 100, (
            "0.05 s and 10 MB on an idle machine"
        )

        readable, _, _ = select.select(idle, [], [], PATIENCE)
        assert readable and readable[0].recv(10) == b"", (
            "a request that never comes is not waited for"
        )
        for client in idle:
            client.close()


@pytest.mark.parametrize(
    ("signals", "status"),
    [([signal.SIGTERM], 0), ([signal.SIGINT, signal.SIGINT], 130)],
    ids=["SIGTERM", "Ctrl-C twice"],
)
def test_a_server_under_load_stops_in_time_with_errors_to_its_clients(model, signals, status):
    with serving(model, "--shutdown-timeout", 6) as (process, port):
        long = {"prompt": ["a"] * 16, "n": 16, "max_tokens": 480, "temperature": 1}
        clients = [fire(port, **long), fire(port, **long), fire(port, **long, stream=True)]
        unread = fire(port, **long, stream=True)
        time.sleep(1)
        began = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)
        process.wait(PATIENCE)
        took = time.monotonic() - began
        received = [everything(client) for client in clients]
        unread.close()
        output = process.stdout.read()
    assert (
        process.returncode == status
        and "Traceback" not in output
        and "CancelledError" not in output
    ), output
    assert took < 6 + 3, "a busy machine may need a moment more"
    assert sum(b"the server is stopping" in one for one in received) >= 2, (
        "clients of unfinished texts get an error"
    )


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("openai", "openai"),
        ("litellm", "litellm"),
        ("langchain-openai", "langchain_openai"),
        ("locust", "locust"),
    ],
)
def test_clients_of_other_projects_work_unchanged(model, name, module):
    if name != "locust":  # it changes threads and sockets of the process that imports it
        pytest.importorskip(module)
    with serving(model) as (_, port):
        target = Target(f"http://127.0.0.1:{port}/v1", "none", model.name, seconds=2)
        try:
            assert CLIENTS[name][1](target)
        except Missing as missing:
            pytest.skip(str(missing))


@pytest.mark.faults
def test_lm_evaluation_harness_measures_a_server_as_the_model_itself(model, tmp_path):
    pytest.importorskip("lm_eval")
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
    from transformers import AutoModelForCausalLM

    from megatron_sorted.exported.tokenizer import for_transformers, open_tokenizer

    for_transformers(open_tokenizer(model)).save_pretrained(tmp_path / "tokenizer")
    with serving(model) as (_, port):
        api = LocalCompletionsAPI(
            base_url=f"http://127.0.0.1:{port}/v1/completions",
            model=model.name,
            tokenizer=str(tmp_path / "tokenizer"),
        )
        pairs = [("Once upon a", " time"), ("The cat", " sat on a mat")]
        requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
        likelihoods = api.loglikelihood(requests)
        texts = api.generate_until(
            [Instance("generate_until", {}, ("Once", {"until": ["\n"], "max_gen_toks": 8}), 0)]
        )
        chat = LocalChatCompletion(
            base_url=f"http://127.0.0.1:{port}/v1/chat/completions", model=model.name
        )
        turns = JsonChatStr(json.dumps([{"role": "user", "content": "hi"}]))
        answers = chat.generate_until(
            [Instance("generate_until", {}, (turns, {"until": ["\n"], "max_gen_toks": 8}), 0)]
        )
    network = AutoModelForCausalLM.from_pretrained(model).float().eval()
    for (context, rest), (logprob, is_greedy) in zip(pairs, likelihoods, strict=True):
        before, after = api._encode_pair(context, rest)
        with torch.no_grad():
            scores = network(torch.tensor([before + after])).logits[0].log_softmax(-1)
        rows = scores[len(before) - 1 : -1]
        assert abs(float(rows.gather(-1, torch.tensor(after)[:, None]).sum()) - logprob) < 1e-3
        assert is_greedy == (rows.argmax(-1).tolist() == after)
    assert isinstance(texts[0], str) and isinstance(answers[0], str)
