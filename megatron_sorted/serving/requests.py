"""Requests of clients of OpenAI's API: fields are checked, unknown fields are refused by name.

The cost of a check is bounded by the field's size: lists are checked here rather than by pydantic,
up to the first mistake, so that a wrong list makes one error instead of one for each element.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_sorted.decoding.strategies import SamplingParameters
from megatron_sorted.old_names import rename_keys
from megatron_sorted.serving.adaptation import DEFAULT_TASK
from megatron_sorted.serving.answers import RefusedError

MAX_STOPS, MOST_STOP_CHARACTERS = 8, 256
MAX_TOP_LOGPROBS = 20
EXCERPT_CHARACTERS = 60


class StreamOptions(BaseModel):
    """Options of a stream; the obfuscation of OpenAI's own streams is accepted, but never added.

    ``include_depths`` is ours: every choice then has ``parts``, the text and exit of each token.
    """

    include_usage: bool = False
    include_obfuscation: bool = False
    include_depths: bool = False


class TextRequest(BaseModel):
    """The fields of both kinds of requests, by OpenAI's names.

    Ours are ``strategy``, ``task``, ``depth`` and ``confidence``.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0, le=1 << 62)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 62)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    n: int = Field(1, ge=1, le=16)
    best_of: int | None = None
    stop: Any = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    strategy: (
        Literal["full", "fixed", "early_exit", "self_speculative", "sorted_speculative", "tree"]
        | None
    ) = None
    task: str = Field(DEFAULT_TASK, min_length=1, max_length=64)
    depth: int | None = Field(None, strict=True)
    confidence: float | None = Field(None, ge=0, le=1)

    def check(self) -> None:
        """Check the fields against each other.

        Raises:
            RefusedError: Two fields contradict each other.
        """
        if self.stream_options is not None and not self.stream:
            raise RefusedError(
                "stream_options: given without stream. Leave it out, or set stream to true.",
                "stream_options",
            )
        if self.best_of not in (None, self.n):
            raise RefusedError(
                f"best_of: {self.best_of} is not n ({self.n}); texts are not ranked here. "
                "Leave it out.",
                "best_of",
            )

    def sampling(self, defaults: SamplingParameters, seed: int) -> SamplingParameters:
        """Return the sampling parameters; OpenAI's ``top_p`` 0 means the most likely token."""
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        if given.get("top_k", 1) < 1:  # 0 and -1 mean all tokens, as in other servers
            given["top_k"] = None
        if given.get("top_p") == 0:
            given |= {"top_p": None, "top_k": 1}
        return replace(defaults, **given, seed=seed)

    @property
    def num_top_logprobs(self) -> int | None:
        """Return how many likely tokens to list at each position; None: no log-probabilities."""
        raise NotImplementedError


class CompletionRequest(TextRequest):
    """The body of POST /v1/completions."""

    prompt: Any
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def num_top_logprobs(self) -> int | None:
        """Return the number that the base class describes."""
        return self.logprobs


class ChatRequest(TextRequest):
    """The body of POST /v1/chat/completions."""

    messages: Any
    max_tokens: int | None = Field(None, ge=1, le=1 << 62)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 62)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def check(self) -> None:
        """Check the fields as the base class does; resolve the two names of the token limit."""
        super().check()
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise RefusedError(
                    "max_tokens and max_completion_tokens differ. Give one of them.",
                    "max_completion_tokens",
                )
            self.max_tokens = self.max_completion_tokens
        if self.top_logprobs and not self.logprobs:
            raise RefusedError(
                "top_logprobs: given without logprobs. Leave it out, or set logprobs to true.",
                "top_logprobs",
            )

    @property
    def num_top_logprobs(self) -> int | None:
        """Return the number that the base class describes."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _is(*values: object) -> Callable[[object], bool]:
    """Build a check that a given value is one of these, where True is not 1."""
    return lambda given: any(
        given == value and isinstance(given, bool) == isinstance(value, bool) for value in values
    )


NEUTRAL: dict[str, Callable[[object], bool]] = {
    "frequency_penalty": _is(0),
    "presence_penalty": _is(0),
    "logit_bias": _is({}),
    "response_format": _is({"type": "text"}),
    "tools": _is([]),
    "functions": _is([]),
    "tool_choice": _is("none", "auto"),
    "function_call": _is("none", "auto"),
    "parallel_tool_calls": _is(True, False),
    "store": _is(False),
    "metadata": lambda given: isinstance(given, dict),
    "service_tier": _is("auto", "default"),
    "suffix": _is(""),
    "modalities": _is(["text"]),
    "audio": _is(),
    "prediction": _is(),
    "reasoning_effort": _is("none"),
    "verbosity": _is("medium"),
    "web_search_options": _is(),
    "safety_identifier": lambda _: True,
    "prompt_cache_key": lambda _: True,
    "prompt_cache_retention": lambda _: True,
    "min_p": _is(0),
    "min_tokens": _is(0),
    "ignore_eos": _is(False),
    "skip_special_tokens": _is(True),
    "stop_token_ids": _is([]),
    "length_penalty": _is(1),
    "use_beam_search": _is(False),
    "include_stop_str_in_output": _is(False),
}
"""Unsupported fields of OpenAI's API and similar servers -> check that a value has no effect.

Such a value is accepted and ignored; any other is refused.
"""
FALSE_MEANS_NONE = ("logprobs", "echo")

Kind = TypeVar("Kind", bound=TextRequest)


def read_request(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """Return a request; null counts as absent, values without an effect are left out.

    Raises:
        RefusedError: A field is unknown, not supported, or has a wrong value.
    """
    given = {}
    try:
        values = rename_keys(values)
    except ValueError as error:
        raise RefusedError(str(error), "strategy") from error
    for name, value in values.items():
        if name not in kind.model_fields and name not in NEUTRAL and name not in FALSE_MEANS_NONE:
            raise RefusedError(
                f"{excerpt(name)}: there is no such field. Leave it out.", name[:EXCERPT_CHARACTERS]
            )
        if value is None or (value is False and name in FALSE_MEANS_NONE):
            continue
        if name in kind.model_fields:
            given[name] = (
                _known_options(value)
                if name == "stream_options" and isinstance(value, dict)
                else value
            )
        elif not NEUTRAL.get(name, _is())(value):
            raise RefusedError(
                f"{name}: {excerpt(value)} is not supported here. Leave it out.", name
            )
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise RefusedError(
            f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}. Change it.", field
        ) from None
    request.check()
    return request


def _known_options(value: dict) -> dict:
    for name in value:
        if name not in StreamOptions.model_fields:
            raise RefusedError(
                f"stream_options.{excerpt(name)}: there is no such option. Leave it out.",
                f"stream_options.{name[:EXCERPT_CHARACTERS]}",
            )
    return {name: one for name, one in value.items() if one is not None}


def read_stop_sequences(value: object) -> list[str]:
    """Return the stop sequences.

    Raises:
        RefusedError: One is not a text or too long, or there are too many.
    """
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list):
        raise RefusedError(
            f"stop: {excerpt(value)} is a {type(value).__name__}. Give a text or a list of texts.",
            "stop",
        )
    if len(stops) > MAX_STOPS:
        raise RefusedError(
            f"stop: {len(stops)} stop sequences are more than {MAX_STOPS}. Give fewer.", "stop"
        )
    for stop in stops:
        if not isinstance(stop, str):
            raise RefusedError(
                f"stop: {excerpt(stop)} is a {type(stop).__name__}. Give texts.", "stop"
            )
        if not 1 <= len(stop) <= MOST_STOP_CHARACTERS:
            raise RefusedError(
                f"stop: a stop sequence of {len(stop)} characters is not of 1 to "
                f"{MOST_STOP_CHARACTERS}. Change it.",
                "stop",
            )
    return stops


def excerpt(value: object) -> str:
    """Return the beginning of a value as JSON, for a message."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}" if value else str(value)
    text = json.dumps(value[: EXCERPT_CHARACTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= EXCERPT_CHARACTERS else f"{text[:EXCERPT_CHARACTERS]}..."
