"""What clients of OpenAI's API send: every field checked, unknown ones refused by name."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .adaptation import DEFAULT_TASK

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class StreamOptions(BaseModel):
    """What else a stream says."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of requests may say; names are OpenAI's, and ours for the way and the task."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = None
    n: int = Field(1, ge=1, le=16)
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    way: Literal["full", "fixed", "early_exit", "self_speculative", "sorted_speculative", "tree"] | None = None
    task: Annotated[str, Field(min_length=1, max_length=64)] = DEFAULT_TASK

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "_Request":
        """Refuses options of a stream where none is wanted.

        Raises:
            ValueError: It is so.
        """
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are given without stream; leave them out or set stream to true")
        return self

    @property
    def stops(self) -> list[str]:
        """Returns the stop words."""
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)] | Tokens
    echo: bool = False
    logprobs: None = None


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        """Takes the newer name of the limit.

        Raises:
            ValueError: Both are given and differ.
        """
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
            self.max_tokens = self.max_completion_tokens
        return self
