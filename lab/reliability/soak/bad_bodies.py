"""Requests that a server must refuse, each with the status and a part of the message it gets."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from lab.reliability.soak.requests import CHAT, COMPLETIONS

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class BadRequest:
    """A request that must be refused.

    Attributes:
        name: What is wrong.
        body: The body.
        status: The status that it must get.
        says: A part of the message.
        path, method: Where it is sent, and how.
        headers: Headers of the request beside the key's.
        has_key: Whether it has a right key.
    """

    name: str
    body: bytes
    status: int
    says: str
    path: str = COMPLETIONS
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON), hash=False)
    has_key: bool = True


def _fields(name: str, says: str, status: int = 400, **fields: object) -> BadRequest:
    """Return a completion with these fields."""
    return BadRequest(name, json.dumps({"prompt": "a", **fields}).encode(), status, says)


def _chat(name: str, says: str, **fields: object) -> BadRequest:
    return BadRequest(name, json.dumps(fields).encode(), 400, says, CHAT)


def _raw(name: str, says: str, body: bytes, status: int = 400) -> BadRequest:
    return BadRequest(name, body, status, says)


def bad_requests(name: str, depths: Sequence[int], context: int) -> list[BadRequest]:
    """Return the requests that a server of this model must refuse."""
    other = max(depths) + 1
    hi = [{"role": "user", "content": "hi"}]
    return [
        *_wrong_fields(),
        *_wrong_bodies(context),
        _fields("unknown model", "is not served here", 404, model="another"),
        _fields("unknown depth in a name", "is not served here", 404, model=f"{name}@{other}"),
        _fields("unknown depth", "is no exit of this model", depth=other),
        _fields("depth against name", "depth", model=f"{name}@{depths[0]}", depth=depths[-1]),
        _fields("depth and confidence", "confidence", depth=depths[0], confidence=0.5),
        _fields("depth against strategy", "contradicts", depth=depths[0], strategy="tree"),
        _fields("confidence above 1", "confidence", confidence=1.5),
        _fields("logprobs of an exit", "strategy fixed", strategy="fixed", logprobs=1),
        _chat("no turns", "not a list of turns", messages=[]),
        _chat("unknown role", "messages.0.role", messages=[{"role": "cat", "content": "hi"}]),
        _chat("no content", "messages.0.content", messages=[{"role": "user"}]),
        _chat("a picture", "not supported", messages=[{
            "role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        _chat("no messages", "messages", model=name),
        _chat("no tokens", "max_tokens", messages=hi, max_tokens=0),
        _chat("two limits", "differ", messages=hi, max_tokens=1, max_completion_tokens=2),
        _chat("top_logprobs alone", "top_logprobs", messages=hi, top_logprobs=2),
        BadRequest("no such path", b"", 404, "Not Found", "/v1/nothing", "GET", {}),
        BadRequest("wrong method", b"", 405, "Method Not Allowed", method="GET", headers={}),
        BadRequest("wrong key", b'{"prompt": "a"}', 401, "key",
                   headers={**JSON, "Authorization": "Bearer a-wrong-key-0123456789"},
                   has_key=False),
        BadRequest("no key", b'{"prompt": "a"}', 401, "key", has_key=False),
    ]  # fmt: skip


def _wrong_fields() -> list[BadRequest]:
    return [
        _fields("unknown field", "there is no such field", promt="a"),
        _fields("field without support", "is not supported here", logit_bias={"5": 1}),
        _fields("65 prompts", "more than 64 in one request", prompt=["a"] * 65),
        _fields("no prompts", "the list is empty", prompt=[]),
        _fields("prompt without tokens", "it has no tokens", prompt=[[]]),
        _fields("token below 0", "is not a token", prompt=[-1]),
        _fields("token above all", "is not a token", prompt=[10**9]),
        _fields("mixed prompts", "prompt.1", prompt=[[1], "a"]),
        _fields("prompt of another type", "prompt", prompt=7),
        _fields("no prompt", "prompt", prompt=None),
        _fields("nine stop sequences", "more than 8", stop=list("abcdefghi")),
        _fields("empty stop sequence", "0 characters", stop=[""]),
        _fields("stop of another type", "stop", stop=5),
        _fields("n of 0", "n:", n=0),
        _fields("n of 17", "n:", n=17),
        _fields("best_of", "best_of", best_of=3),
        _fields("temperature of 3", "temperature", temperature=3),
        _fields("top_p of -1", "top_p", top_p=-1),
        _fields("top_k of -2", "top_k", top_k=-2),
        _fields("repetition penalty of 0", "repetition_penalty", repetition_penalty=0),
        _fields("seed of 2**64", "seed", seed=1 << 64),
        _fields("max_tokens of -1", "max_tokens", max_tokens=-1),
        _fields("unknown strategy", "strategy", strategy="guess"),
        _fields("stream_options alone", "stream_options", stream_options={"include_usage": True}),
        _fields("unclear option", "include_usage", stream=True,
                stream_options={"include_usage": "maybe"}),
        _fields("logprobs of 21", "logprobs", logprobs=21),
    ]  # fmt: skip


def _wrong_bodies(context: int) -> list[BadRequest]:
    text = b'{"prompt": "a"}'
    return [
        _raw("half a body of JSON", "body", b'{"prompt": "a",'),
        _raw("no body", "body", b""),
        _raw("a list", "is a list", b"[1]"),
        _raw("not UTF-8", "body", b'{"prompt": "\xff"}'),
        _raw("NaN", "body", b'{"prompt": "a", "temperature": NaN}'),
        _raw("deep lists", "body", b"[" * 40_000 + b"]" * 40_000),
        _raw("half a pair", "half of a UTF-16 pair", rb'{"prompt": "Once \ud83d"}'),
        _raw("many elements", "elements", b'{"prompt": [' + b"-1," * 300_000 + b"-1]}"),
        _raw("many tokens", "context", b'{"prompt": [' + b"5," * (context + 1) + b"5]}"),
        _raw("long text", "context", b'{"prompt": "' + b"a b " * 100_000 + b'"}'),
        _raw("full context", "fill", b'{"prompt": [' + b"5," * (context - 1) + b"5]}"),
        _raw("too large", "Send less", b'{"prompt": "' + b"a " * (5 << 20) + b'"}', 413),
        BadRequest("no content type", text, 400, "content-type", headers={}),
        BadRequest("another content type", text, 400, "content-type",
                   headers={"Content-Type": "text/plain"}),
    ]  # fmt: skip
