"""``megatron-sorted tune`` and ``serve`` with ``--engine vllm``, as a user runs them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sorted.commands.tune import main as tune
from megatron_sorted.decoding.tuning.tuned_options import read_draft_schedule, read_tuned_options
from tests.support.ports import free_port
from tests.vllm.models import write_model

KEY = "secret-key-0123456789"
TUNED = {
    "format": 1,
    "best": "self_speculative",
    "strategies": {"full": {}, "self_speculative": {"depth": 2, "num_draft_tokens": 3}},
    "agreement": {"1": 0.6, "2": 0.8, "3": 0.9},
}
OWN = ["--enforce-eager", "--max-model-len", "256"]
START_SECONDS, STOP_SECONDS = 400, 60


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Return a model whose decoding.json holds what our own tuning records."""
    folder = write_model(tmp_path_factory.mktemp("served") / "nested")
    (folder / "decoding.json").write_text(json.dumps(TUNED))
    return folder


def test_a_schedule_is_measured_inside_vllm_and_written(directory, capsys):
    own = [*OWN, "--dtype", "float32", "--kv-cache-memory-bytes", str(32 << 20)]
    tuned = [str(directory), "--engine", "vllm", "--num-draft-tokens", "3", "--max-num-seqs", "3"]
    tune([*tuned, "--", *own])
    path = directory / "decoding.json"
    measured = read_draft_schedule(path, "vllm", 2)
    assert measured["acceptance"] == 0.8 and measured["options"] == own
    assert [row["batch_size"] for row in measured["steps"]] == [1, 2, 3]
    for row in measured["steps"]:
        assert row["plain"] > 0 and row["verifying"].keys() == {"1", "2", "3"}
        # a pass of 2 of 4 layers without the rest of a step, and a pass of more tokens
        assert 0 < row["drafting"] < row["plain"] * 3
        assert all(0 < seconds < row["plain"] * 5 for seconds in row["verifying"].values())
    assert measured["schedule"][0][0] == 1 and measured["schedule"][-1][1] == 3
    assert read_tuned_options(path)["agreement"] == TUNED["agreement"]
    assert "exit 2, whose next token is the full model's in 80.0% of places" in (
        capsys.readouterr().out
    )


def test_texts_too_short_to_measure_are_refused(directory):
    from megatron_sorted.errors import SettingsError

    own = ["--enforce-eager", "--max-model-len", "64", "--kv-cache-memory-bytes", str(32 << 20)]
    with pytest.raises(SettingsError, match="--max-model-len 64: measuring drafts of up to 6"):
        tune([str(directory), "--engine", "vllm", "--max-num-seqs", "2", "--", *own])


@pytest.fixture
def server(directory, tmp_path) -> Iterator[tuple[subprocess.Popen, str, Path]]:
    """Start a server by the command; yield its process, address and output."""
    port, log = free_port(), tmp_path / "log"
    line = [sys.executable, "-m", "megatron_sorted", "serve", str(directory), "--engine", "vllm"]
    line += ["--strategy", "self_speculative", "--exit-layer", "2", "--num-draft-tokens", "3"]
    line += ["--port", str(port), "--dtype", "float32", "--threads", "1"]
    line += ["--cache-memory", "0.05", "--max-num-seqs", "4", "--", *OWN]
    variables = {**os.environ, "MEGATRON_SORTED_API_KEY": KEY}
    # the server decides for itself what the tests set for engines in their own process
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER"):
        variables.pop(name, None)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            line, env=variables, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process, f"http://127.0.0.1:{port}", log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def requested(address: str, body: dict | None = None, key: str = KEY) -> str:
    """Return the answer to a request, as text."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(address, data, headers), timeout=120
    ) as answer:
        return answer.read().decode()


def wait_until_it_answers(process: subprocess.Popen, address: str, log: Path) -> None:
    """Wait until a server is healthy; fail with its output if it ends before."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        try:
            requested(f"{address}/health")
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no answer in {START_SECONDS} s: {log.read_text(errors='replace')[-4000:]}")


def greedy(directory: Path, prompt: list[int], count: int) -> list[int]:
    """Return the tokens that transformers adds greedily, each from a pass over the whole text."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    known = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(prompt) :]


def counted(metrics: str, name: str) -> float:
    """Return the value of a counter in the text of /metrics."""
    return float(re.search(rf"^vllm:{name}_total{{.*}} (\S+)$", metrics, re.MULTILINE)[1])


def test_the_command_serves_drafts_and_stops(server, directory):
    process, address, log = server
    wait_until_it_answers(process, address, log)
    prompt, count = [1, 5, 9, 40], 48
    body = {"model": "nested", "prompt": prompt, "max_tokens": count, "temperature": 0}
    answer = json.loads(requested(f"{address}/v1/completions", {**body, "ignore_eos": True}))
    expected = greedy(directory, prompt, count)
    assert answer["choices"][0]["text"] == "".join(f"w{token}" for token in expected)
    metrics = requested(f"{address}/metrics")
    drafted = counted(metrics, "spec_decode_num_draft_tokens")
    accepted = counted(metrics, "spec_decode_num_accepted_tokens")
    assert 0 < accepted <= drafted
    # every step adds a token of the full model's, and the accepted ones before it
    assert accepted + counted(metrics, "spec_decode_num_drafts") >= count - 1
    with pytest.raises(urllib.error.HTTPError, match="401"):
        requested(f"{address}/v1/completions", body, "another-key-0123456789")
    first = log.read_text(errors="replace").split("\n", 1)[0]
    assert 'VLLM_API_KEY="$MEGATRON_SORTED_API_KEY"' in first and KEY not in first
    process.send_signal(signal.SIGTERM)
    process.wait(STOP_SECONDS)
    with pytest.raises(OSError):
        requested(f"{address}/health")
    # no process of it is left
    end = time.monotonic() + STOP_SECONDS
    while time.monotonic() < end:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("processes of the server are left")
