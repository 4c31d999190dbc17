"""Clients and load tools of other projects, each a function that returns what it did."""

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROMPT, NUM_TOKENS, USERS = "Once upon a time", 16, 8
USER = [{"role": "user", "content": "Say something about the sea."}]
LOCUST_FILE = """\
import os

from locust import HttpUser, task

BODY = {"model": os.environ["SERVED_MODEL"], "prompt": "Once upon a time", "max_tokens": 16}
HEADERS = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}


class Client(HttpUser):
    @task
    def complete(self):
        self.client.post("/v1/completions", json=BODY, headers=HEADERS)
"""


class Missing(Exception):
    """A program or an option that a client needs is not there."""


@dataclass(frozen=True)
class Target:
    """The server that is asked.

    Attributes:
        url: Base URL, with /v1.
        key: API key.
        model: Name of the model.
        tokenizer: Directory that transformers can open; None without one.
        seconds: Duration of load.
    """

    url: str
    key: str
    model: str
    tokenizer: Path | None = None
    seconds: float = 10.0

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment of programs that ask this server."""
        return {**os.environ, "OPENAI_API_KEY": self.key, "SERVED_MODEL": self.model}


def run_openai(target: Target) -> str:
    """List models, complete, converse, stream, and score with OpenAI's own client."""
    import openai

    client = openai.OpenAI(base_url=target.url, api_key=target.key)
    listed = [client.models.retrieve(one.id).id for one in client.models.list()]
    text = client.completions.create(
        model=target.model, prompt=PROMPT, max_tokens=NUM_TOKENS, logprobs=2
    )
    scores = text.choices[0].logprobs.token_logprobs
    chat = client.chat.completions.create(
        model=target.model, messages=USER, max_tokens=NUM_TOKENS, n=2
    )
    stream = client.chat.completions.create(
        model=target.model, messages=USER, max_tokens=NUM_TOKENS, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    events = list(stream)
    return (
        f"{len(listed)} models listed; completion of {text.usage.completion_tokens} tokens with "
        f"{len(scores)} log-probabilities; {len(chat.choices)} answers; stream of {len(events)} "
        f"events, usage {events[-1].usage.completion_tokens} tokens"
    )


def run_litellm(target: Target) -> str:
    """Complete, converse and stream with litellm."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    import litellm

    place = {"api_base": target.url, "api_key": target.key, "max_tokens": NUM_TOKENS}
    chat = litellm.completion(model=f"openai/{target.model}", messages=USER, **place)
    text = litellm.text_completion(
        model=f"text-completion-openai/{target.model}", prompt=PROMPT, **place
    )
    stream = litellm.completion(model=f"openai/{target.model}", messages=USER, stream=True, **place)
    return (
        f"answer of {chat.usage.completion_tokens} tokens, completion of "
        f"{text.usage.completion_tokens}, stream of {len(list(stream))} events"
    )


def run_langchain(target: Target) -> str:
    """Complete, converse, stream and ask in a batch with langchain-openai."""
    import langchain_openai as langchain

    place = {"base_url": target.url, "api_key": target.key, "max_tokens": NUM_TOKENS}
    text = langchain.OpenAI(model=target.model, **place).invoke(PROMPT)
    chat = langchain.ChatOpenAI(model=target.model, **place)
    answer, events = chat.invoke("hi"), list(chat.stream("hi"))
    batch = chat.batch(["hi", "who?", "why?"])
    return (
        f"completion of {len(text)} characters, answer of {len(answer.content)}, stream of "
        f"{len(events)} events, batch of {len(batch)} answers"
    )


def run_lm_eval(target: Target) -> str:
    """Score two continuations and write one text with lm-evaluation-harness."""
    if target.tokenizer is None:
        raise Missing("it needs --tokenizer")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    os.environ["OPENAI_API_KEY"] = target.key
    model = LocalCompletionsAPI(
        base_url=f"{target.url}/completions", model=target.model,
        tokenizer=str(target.tokenizer),
    )  # fmt: skip
    pairs = [("Once upon a", " time"), ("The cat", " sat on a mat")]
    scores = model.loglikelihood(
        [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    )
    options = {"until": ["\n\n"], "max_gen_toks": NUM_TOKENS}
    texts = model.generate_until([Instance("generate_until", {}, (PROMPT, options), 0)])
    shown = ", ".join(f"{score:.2f}" for score, _ in scores)
    return f"log-likelihoods {shown}; a text of {len(texts[0])} characters"


def run_locust(target: Target) -> str:
    """Let locust's users ask for completions at once."""
    if importlib.util.find_spec("locust") is None:  # an import would change this process's sockets
        raise Missing("locust is not installed")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "locustfile.py"
        file.write_text(LOCUST_FILE, encoding="utf-8")
        _run(
            [sys.executable, "-m", "locust", "-f", file, "--headless", "--users", USERS,
             "--spawn-rate", USERS, "--run-time", f"{max(round(target.seconds), 1)}s",
             "--stop-timeout", 30, "--host", target.url.removesuffix("/v1"),
             "--csv", Path(folder) / "run", "--only-summary"],
            target,
        )  # fmt: skip
        with (Path(folder) / "run_stats.csv").open(encoding="utf-8", newline="") as stats:
            whole = next(row for row in csv.DictReader(stats) if row["Name"] == "Aggregated")
    if not int(whole["Request Count"]) or int(whole["Failure Count"]):
        raise RuntimeError(f"{whole['Failure Count']} of {whole['Request Count']} failed")
    return (
        f"{USERS} users: {whole['Request Count']} requests, none failed, "
        f"{float(whole['Requests/s']):.1f} a second, median {whole['Median Response Time']} ms"
    )


def run_hey(target: Target) -> str:
    """Let hey ask for completions at once."""
    program = shutil.which("hey")
    if program is None:
        raise Missing("there is no program hey on the path")
    body = f'{{"model": "{target.model}", "prompt": "{PROMPT}", "max_tokens": {NUM_TOKENS}}}'
    printed = _run(
        [program, "-z", f"{target.seconds:g}s", "-c", USERS, "-t", 60, "-m", "POST",
         "-T", "application/json", "-H", f"Authorization: Bearer {target.key}", "-d", body,
         f"{target.url}/completions"],
        target,
    )  # fmt: skip
    lines = [line.strip() for line in printed.splitlines()]
    speed = next(line for line in lines if line.startswith("Requests/sec"))
    statuses = [line for line in lines if line.startswith("[")]
    if any(not line.startswith("[200]") for line in statuses) or not statuses:
        raise RuntimeError("; ".join(statuses) or "no answer")
    return f"{USERS} users: {speed}; {'; '.join(statuses)}"


def _run(command: list[object], target: Target) -> str:
    done = subprocess.run(
        [str(word) for word in command], env=target.variables, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {(done.stderr or done.stdout)[-300:]}")
    return done.stdout


CLIENTS: dict[str, tuple[str | None, Callable[[Target], str]]] = {
    "openai": ("openai", run_openai),
    "litellm": ("litellm", run_litellm),
    "langchain-openai": ("langchain-openai", run_langchain),
    "lm-eval": ("lm_eval", run_lm_eval),
    "locust": ("locust", run_locust),
    "hey": (None, run_hey),
}
"""Name -> package, None for a program, and what is done with it."""
