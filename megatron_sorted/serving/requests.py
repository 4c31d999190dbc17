"""What clients of OpenAI's API send: every field checked at a cost that its size bounds, unknown ones refused by name.

A list that is wrong costs one error, not one for each of its elements: lists are looked through here, up to the first mistake.
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

MOST_STOPS, MOST_STOP_LETTERS = 8, 256
MOST_TOP_LOGPROBS = 20
SHOWN_LETTERS = 60


class StreamOptions(BaseModel):
    """What else a stream says; the obfuscation of OpenAI's own streams is left out whatever is asked."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    """What both kinds of requests may say; names are OpenAI's, and ours for the way and the task."""

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

    def check(self) -> None:
        """Check fields against each other.

        Raises:
            RefusedError: Two contradict each other.
        """
        if self.stream_options is not None and not self.stream:
            raise RefusedError(
                "stream_options: given without stream. Leave them out, or set stream to true.",
                "stream_options",
            )
        if self.best_of not in (None, self.n):
            raise RefusedError(
                f"best_of: {self.best_of} is not n ({self.n}); texts are not ranked here. Leave it out.",
                "best_of",
            )

    def sampling(self, usual: SamplingParameters, seed: int) -> SamplingParameters:
        """Return how tokens are chosen: as asked, else as usual. OpenAI's ``top_p`` 0 takes the most likely token alone."""
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        if given.get("top_k", 1) < 1:  # 0 and -1 mean all tokens, as in other servers
            given["top_k"] = None
        if given.get("top_p") == 0:
            given |= {"top_p": None, "top_k": 1}
        return replace(usual, **given, seed=seed)

    @property
    def num_top_logprobs(self) -> int | None:
        """Return how many of the most likely tokens are to be told of every token; None for no log-probabilities at all."""
        raise NotImplementedError


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Any
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    def num_top_logprobs(self) -> int | None:
        """See the base class."""
        return self.logprobs


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Any
    max_tokens: int | None = Field(None, ge=1, le=1 << 62)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 62)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    def check(self) -> None:
        """See the base class; take the newer name of the limit."""
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
        """See the base class."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _is(*values: object) -> Callable[[object], bool]:
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
"""Fields of OpenAI's API, and of servers like it, that are not supported here -> whether a value changes nothing, and so is taken."""
FALSE_MEANS_NONE = ("logprobs", "echo")

Kind = TypeVar("Kind", bound=_Request)


def read_request(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """Return a request; null is absent, and what changes nothing is left out.

    Raises:
        RefusedError: A field is unknown, not supported, or has a value that cannot be.
    """
    given = {}
    try:
        values = rename_keys(values)
    except ValueError as error:
        raise RefusedError(str(error), "strategy") from error
    for name, value in values.items():
        if name not in kind.model_fields and name not in NEUTRAL and name not in FALSE_MEANS_NONE:
            raise RefusedError(
                f"{shown(name)}: there is no such field. Leave it out.", name[:SHOWN_LETTERS]
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
            raise RefusedError(f"{name}: {shown(value)} is not supported here. Leave it out.", name)
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RefusedError(
            f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}. Change it.", place
        ) from None
    request.check()
    return request


def _known_options(value: dict) -> dict:
    for name in value:
        if name not in StreamOptions.model_fields:
            raise RefusedError(
                f"stream_options.{shown(name)}: there is no such option. Leave it out.",
                f"stream_options.{name[:SHOWN_LETTERS]}",
            )
    return {name: one for name, one in value.items() if one is not None}


def read_prompts(
    value: object, most_prompts: int, max_positions: int, vocab_size: int
) -> list[str | list[int]]:
    """Return the prompts, each a text or its tokens, of OpenAI's four forms: text, texts, tokens, lists of tokens.

    Raises:
        RefusedError: It is none of these, or cannot fit the model.
    """
    if isinstance(value, str):
        return [value]
    rule = "Give a text, a list of texts, a list of tokens or a list of such lists."
    if not isinstance(value, list):
        raise RefusedError(f"prompt: {shown(value)} is a {type(value).__name__}. {rule}", "prompt")
    if not value:
        raise RefusedError(f"prompt: the list is empty. {rule}", "prompt")
    if type(value[0]) is int:
        return [_tokens(value, "prompt", max_positions, vocab_size)]
    if len(value) > most_prompts:
        raise RefusedError(
            f"prompt: {len(value)} prompts are more than {most_prompts} in one request. Send fewer.",
            "prompt",
        )
    if all(isinstance(one, str) for one in value):
        return value
    for place, one in enumerate(value):
        if not isinstance(one, list):
            raise RefusedError(
                f"prompt.{place}: {shown(one)} is a {type(one).__name__}. {rule}", f"prompt.{place}"
            )
    return [
        _tokens(one, f"prompt.{place}", max_positions, vocab_size)
        for place, one in enumerate(value)
    ]


def _tokens(value: list, field: str, max_positions: int, vocab_size: int) -> list[int]:
    """Return tokens after looking at their number first: however long a list is, no more than a context of it is looked through."""
    if not value:
        raise RefusedError(
            f"{field}: it has no tokens. Give at least one, such as the tokenizer's bos.", field
        )
    if len(value) > max_positions:
        raise RefusedError(
            f"{field}: {len(value)} tokens are more than the model's context of {max_positions}. Shorten it.",
            field,
        )
    for token in value:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise RefusedError(
                f"{field}: {shown(token)} is not a token in 0..{vocab_size - 1}. Use the model's own tokenizer.",
                field,
            )
    return value


def read_stops(value: object) -> list[str]:
    """Return the stop words.

    Raises:
        RefusedError: They are no words, or too many or too long.
    """
    words = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(words, list):
        raise RefusedError(
            f"stop: {shown(value)} is a {type(value).__name__}. Give a text or a list of texts.",
            "stop",
        )
    if len(words) > MOST_STOPS:
        raise RefusedError(
            f"stop: {len(words)} stop words are more than {MOST_STOPS}. Give fewer.", "stop"
        )
    for word in words:
        if not isinstance(word, str):
            raise RefusedError(
                f"stop: {shown(word)} is a {type(word).__name__}. Give texts.", "stop"
            )
        if not 1 <= len(word) <= MOST_STOP_LETTERS:
            raise RefusedError(
                f"stop: a stop word of {len(word)} characters is not of 1 to {MOST_STOP_LETTERS}. Change it.",
                "stop",
            )
    return words


def shown(value: object) -> str:
    """Return the beginning of a value as JSON, for a message."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}" if value else str(value)
    text = json.dumps(value[: SHOWN_LETTERS + 1]) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."
