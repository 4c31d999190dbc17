"""A llama-server of this machine: started, asked, and stopped; it is idle in between."""

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.errors import PlatformError
from megatron_sorted.reading.json_text import parse_json

START_SECONDS = 300.0
ANSWER_SECONDS = 600.0
LAST_PART = 800
"""Characters of a log that an error shows."""


@dataclass(frozen=True)
class ServedModel:
    """What a server runs.

    Attributes:
        program: The program llama-server.
        model: The GGUF file.
        threads: Number of threads.
        context: Longest text of a slot, in tokens.
        slots: Number of texts that are written at once.
        cache: Type of keys and values.
        draft: GGUF file of a model that drafts; None without one.
        num_draft_tokens: Most tokens of a draft.
        least_confidence: Probability below which a draft ends, 0 to 1.
        flash: Flash attention, llama.cpp's "auto", "on" or "off". On CPUs it is used and errs by a
            few hundredths of a logit, also where keys and values are float32.
    """

    program: Path
    model: Path
    threads: int
    context: int
    slots: int = 1
    cache: str = "f16"
    draft: Path | None = None
    num_draft_tokens: int = 4
    least_confidence: float = 0.0
    flash: str = "auto"

    def command(self, port: int) -> list[str]:
        """Return the command that serves on a port of this machine."""
        arguments = [
            self.program, "--model", self.model, "--host", "127.0.0.1", "--port", port,
            "--threads", self.threads, "--threads-batch", self.threads,
            "--ctx-size", self.context * self.slots, "--parallel", self.slots,
            "--cache-type-k", self.cache, "--cache-type-v", self.cache,
            "--flash-attn", self.flash,
            # an idle server must not use the processor, and no prompt may be remembered
            "--poll", 0, "--no-cache-prompt", "--cache-ram", 0, "--ctx-checkpoints", 0,
            "--fit", "off", "--no-ui", "--no-slots", "--offline", "--log-verbosity", 1,
        ]  # fmt: skip
        if self.draft is not None:
            arguments += [
                "--model-draft", self.draft, "--spec-type", "draft-simple",
                "--spec-draft-n-max", self.num_draft_tokens,
                "--spec-draft-p-min", self.least_confidence, "--threads-draft", self.threads,
                "--cache-type-k-draft", self.cache, "--cache-type-v-draft", self.cache,
            ]  # fmt: skip
        return [str(word) for word in arguments]


@dataclass(frozen=True)
class Completion:
    """A text that a server wrote, with the server's own times.

    Attributes:
        tokens: The new tokens.
        num_prompt_tokens: Number of tokens that it read.
        prompt_seconds, seconds: The server's seconds for the prompt, and for what came after it.
        num_steps: Number of tokens that it counts for the latter.
        num_drafted, num_accepted: Numbers of drafted and accepted tokens.
        is_ended: Whether the text ended by itself.
    """

    tokens: list[int]
    num_prompt_tokens: int
    prompt_seconds: float
    seconds: float
    num_steps: float
    num_drafted: int
    num_accepted: int
    is_ended: bool = False

    @classmethod
    def of(cls, answer: dict) -> "Completion":
        """Read a server's answer."""
        times = answer["timings"]
        seconds = times["predicted_ms"] / 1000
        return cls(
            answer["tokens"],
            times["prompt_n"],
            times["prompt_ms"] / 1000,
            seconds,
            times["predicted_per_second"] * seconds,
            times.get("draft_n", 0),
            times.get("draft_n_accepted", 0),
            answer.get("stop_type") == "eos",
        )


class LlamaServer:
    """A running server; the log of the program is beside its model's file.

    Args:
        served: What it runs.

    Raises:
        PlatformError: It ended, or did not start in time.
    """

    def __init__(self, served: ServedModel):
        self.served = served
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        name = f"{served.model.stem}-{served.threads}-{self.port}.log"
        self.log = served.model.with_name(name)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                served.command(self.port), stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def complete(self, prompt: list[int], num_tokens: int, ignore_eos: bool = True) -> Completion:
        """Return the greedy continuation of a prompt.

        Args:
            prompt: Tokens to continue.
            num_tokens: Number of new tokens.
            ignore_eos: Whether tokens that end a text are never written.

        Raises:
            PlatformError: The server has ended, or refuses.
        """
        answer = self._post(
            "/completion",
            {
                "prompt": prompt, "n_predict": num_tokens, "temperature": 0, "top_k": 1,
                "samplers": ["top_k"], "ignore_eos": ignore_eos, "return_tokens": True,
                "cache_prompt": False,
            },
        )  # fmt: skip
        return Completion.of(answer)

    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens of a text, as the server reads a prompt.

        Raises:
            PlatformError: The server has ended, or refuses.
        """
        return self._post("/tokenize", {"content": text, "add_special": True})["tokens"]

    def rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return a conversation as the file's chat template renders it.

        Raises:
            PlatformError: The server has ended, or refuses.
        """
        return self._post("/apply-template", {"messages": list(messages)})["prompt"]

    def _post(self, path: str, body: dict) -> dict:
        status, answer = self._ask("POST", path, body)
        if status != http.client.OK:
            raise PlatformError(
                f"llama-server: status {status}: {json.dumps(answer)[:LAST_PART]}. See {self.log}."
            )
        return answer

    def complete_all(self, prompts: list[list[int]], num_tokens: int) -> list[Completion]:
        """Return the continuations of prompts that are sent at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, num_tokens), prompts))

    def cpu_seconds(self) -> float:
        """Return the processor time that the server has used so far."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8")
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End the server and remove its log, unless it has ended by itself."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.log.unlink(missing_ok=True)

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                last = self.log.read_text(encoding="utf-8", errors="replace")[-LAST_PART:]
                raise PlatformError(
                    f"llama-server ended with status {self.process.returncode}. Correct what "
                    f"{self.log} says: {last}"
                )
            try:
                if self._ask("GET", "/health", None)[0] == http.client.OK:
                    return
            except PlatformError:
                pass  # it does not listen yet
            time.sleep(0.05)
        raise PlatformError(
            f"llama-server did not start within {START_SECONDS:g} seconds. See {self.log}."
        )

    def _ask(self, method: str, path: str, body: dict | None) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, parse_json(response.read() or b"{}", "llama-server's answer")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise PlatformError(
                f"llama-server did not answer ({error}). See {self.log}, and run again."
            ) from error
        finally:
            connection.close()
