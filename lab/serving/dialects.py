"""How each server is asked for the greedy continuation of a prompt, and how its events are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_sorted.errors import PlatformError
from megatron_sorted.reading.json_text import parse_json


@dataclass(frozen=True)
class Prompt:
    """A prompt in the forms that servers accept.

    Attributes:
        text: The text.
        ids: The tokens, with those that the tokenizer puts before a text.
    """

    text: str
    ids: Sequence[int]


@dataclass(frozen=True)
class Piece:
    """What one event of a stream brought.

    Attributes:
        text: New text, or new tokens where a server sends those.
        num_tokens: Number of all new tokens, in the event that names it.
        num_cached: Number of the prompt's tokens that were not read, in the event that names it.
    """

    text: str | Sequence[int] = ""
    num_tokens: int | None = None
    num_cached: int | None = None


class Dialect(Protocol):
    """One server's API."""

    path: str

    def body(self, prompt: Any, num_tokens: int) -> dict:
        """Return the request of exactly this number of new tokens."""

    def read(self, event: dict) -> Piece:
        """Return what an event brought."""

    def text_of(self, pieces: Sequence[Piece]) -> str:
        """Return the whole text, without blanks around it."""


@dataclass(frozen=True)
class Completions:
    """OpenAI's completions.

    Attributes:
        fields: Further fields of each request.
        as_text: Whether the server takes no tokens as a prompt.
        path: The endpoint.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    as_text: bool = False
    path: str = "/v1/completions"

    def body(self, prompt: Prompt, num_tokens: int) -> dict:
        """Return the request; see `Dialect`."""
        return {
            "prompt": prompt.text if self.as_text else list(prompt.ids),
            "max_tokens": num_tokens, "temperature": 0, "stream": True, **self.fields,
        }  # fmt: skip

    def read(self, event: dict) -> Piece:
        """Return what an event brought; see `Dialect`."""
        text = "".join(choice.get("text") or "" for choice in event.get("choices", ()))
        usage = event.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Piece(text, usage.get("completion_tokens"), cached)

    def text_of(self, pieces: Sequence[Piece]) -> str:
        """Return the whole text; see `Dialect`."""
        return "".join(piece.text for piece in pieces).strip()


@dataclass(frozen=True)
class Chat(Completions):
    """OpenAI's conversations; a prompt is a list of messages."""

    path: str = "/v1/chat/completions"

    def body(self, prompt: Sequence[dict], num_tokens: int) -> dict:
        """Return the request; see `Dialect`."""
        return {
            "messages": list(prompt),
            "max_tokens": num_tokens, "temperature": 0, "stream": True, **self.fields,
        }  # fmt: skip

    def read(self, event: dict) -> Piece:
        """Return what an event brought; see `Dialect`."""
        usage = super().read({"usage": event.get("usage")})
        text = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
        return Piece(text, usage.num_tokens, usage.num_cached)


@dataclass(frozen=True)
class LlamaCompletions:
    """llama-server's own endpoint, which takes tokens and returns them.

    Attributes:
        decode: Function from tokens to text: the server has a stand-in vocabulary.
        path: The endpoint.
    """

    decode: Callable[[list[int]], str]
    path: str = "/completion"

    def body(self, prompt: Prompt, num_tokens: int) -> dict:
        """Return the request; see `Dialect`."""
        return {
            "prompt": list(prompt.ids), "n_predict": num_tokens, "temperature": 0, "top_k": 1,
            "samplers": ["top_k"], "ignore_eos": True, "return_tokens": True,
            "cache_prompt": False, "stream": True,
        }  # fmt: skip

    def read(self, event: dict) -> Piece:
        """Return what an event brought; see `Dialect`."""
        return Piece(
            event.get("tokens") or (), event["tokens_predicted"] if event.get("stop") else None
        )

    def text_of(self, pieces: Sequence[Piece]) -> str:
        """Return the whole text; see `Dialect`."""
        return self.decode([token for piece in pieces for token in piece.text]).strip()


def parse_event(line: bytes) -> dict | None:
    """Return the JSON of a line of a stream; None for other lines and for the end.

    >>> parse_event(b'data: {"a": 1}\\n')
    {'a': 1}
    >>> parse_event(b"data: [DONE]")
    """
    if not line.startswith(b"data:"):
        return None
    payload = line[5:].strip()
    return (
        None
        if payload == b"[DONE]"
        else parse_json(payload, "an event of the stream", error=PlatformError)
    )
