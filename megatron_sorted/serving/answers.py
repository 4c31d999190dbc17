"""Responses in OpenAI's format: complete ones, streams, errors."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator

from fastapi.responses import JSONResponse

from megatron_sorted.decoding.text_generator import StreamedText
from megatron_sorted.errors import MemoryExhaustedError, SortedError
from megatron_sorted.serving.token_logprobs import TokenScore, as_chat_logprobs, as_text_logprobs

FINISH = {"eos": "stop", "stop": "stop", "length": "length", None: "length"}
"""Our reason for a text's end -> OpenAI's; a text of no new tokens has reached its length."""
RETRY_SECONDS = 5


class RefusedError(SortedError):
    """A request cannot be answered: the message, the field at fault and the HTTP status."""

    def __init__(self, message: str, field: str | None = None, status: int = 400):
        super().__init__(message)
        self.field, self.status = field, status


class BusyError(SortedError):
    """The server accepts no requests: its queue is full, or it is stopping. Retry later."""

    def __init__(self, message: str, retry_seconds: int = RETRY_SECONDS):
        super().__init__(message)
        self.retry_seconds = retry_seconds


class AsciiResponse(JSONResponse):
    """A JSON response in ASCII, which can hold any text, also halves of UTF-16 pairs."""

    def render(self, content: object) -> bytes:
        """Return the response's body."""
        return json.dumps(content).encode("ascii")


def error_response(
    message: str, field: str | None = None, status: int = 400, retry_seconds: int = RETRY_SECONDS
) -> JSONResponse:
    """Build an error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"retry-after": str(retry_seconds)} if status == 503 else None
    return AsciiResponse(
        {"error": {"message": message, "type": kind, "param": field, "code": None}}, status, headers
    )


def response_to_error(error: Exception, field: str | None) -> JSONResponse:
    """Build the response for an error; ``field`` is what our errors without a field are about."""
    if isinstance(error, RefusedError):
        return error_response(str(error), error.field, error.status)
    if isinstance(error, BusyError):
        return error_response(str(error), None, 503, error.retry_seconds)
    if isinstance(error, MemoryExhaustedError):
        return error_response(str(error), None, 503)
    if isinstance(error, SortedError):
        return error_response(str(error), field)
    return error_response(
        f"the server failed ({type(error).__name__}); other requests are still served.", None, 500
    )


class CompletionResponse:
    """A response in OpenAI's format, built from the outputs of a job.

    Args:
        prefix: Beginning of the response's id.
        kind: "text_completion" or "chat.completion".
        model: Name of the model.
        echoes: The text to put before the completion of each prompt.
    """

    def __init__(self, prefix: str, kind: str, model: str, echoes: list[str]):
        self.kind, self.echoes, self.is_chat = kind, echoes, kind == "chat.completion"
        self.common_fields = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.scores: list[list[TokenScore]] | None = None

    def begin(self, n: int, prompt_tokens: int) -> None:
        """Prepare for ``n`` texts of each prompt."""
        self.texts = [echo for echo in self.echoes for _ in range(n)]
        self.finishes: list[str | None] = [None] * len(self.texts)
        self.offsets = [0] * len(self.texts)
        self.prompt_tokens, self.tokens = prompt_tokens, 0

    def add(self, piece: StreamedText) -> str:
        """Record new tokens and return their text; a chat message begins without a space."""
        text = piece.text if self.texts[piece.row] or not self.is_chat else piece.text.lstrip(" ")
        self.texts[piece.row] += text
        self.finishes[piece.row] = piece.finish
        self.tokens += len(piece.added.tokens)
        return text

    def usage(self) -> dict[str, int]:
        """Return the token counts."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
        }

    def complete(self) -> dict:
        """Return the complete response."""
        choices = []
        for index, (text, finish) in enumerate(zip(self.texts, self.finishes, strict=True)):
            content = (
                {"message": {"role": "assistant", "content": text}}
                if self.is_chat
                else {"text": text}
            )
            choices.append(
                {
                    "index": index,
                    **content,
                    "logprobs": self._logprobs(index),
                    "finish_reason": FINISH[finish],
                }
            )
        return {
            **self.common_fields,
            "object": self.kind,
            "choices": choices,
            "usage": self.usage(),
        }

    async def stream(
        self, pieces: AsyncIterator[StreamedText | list], field: str, with_usage: bool
    ) -> AsyncIterator[str]:
        """Yield server-sent events; ``with_usage`` the last but one holds the token counts."""
        kind = "chat.completion.chunk" if self.is_chat else self.kind
        # scores arrive before the first piece, and the first events need those of the prompt
        begun = False
        try:
            async for piece in pieces:
                if isinstance(piece, list):
                    self.scores = piece
                if not begun:
                    for event in self._beginnings(kind):
                        yield event
                    begun = True
                if isinstance(piece, list):
                    continue
                text = self.add(piece)
                if text or piece.finish or self.scores:
                    content = (
                        {"delta": {"content": text} if text else {}}
                        if self.is_chat
                        else {"text": text}
                    )
                    logprobs = self._logprobs(piece.row, len(piece.added.tokens))
                    yield self._event(
                        kind,
                        piece.row,
                        content,
                        FINISH[piece.finish] if piece.finish else None,
                        logprobs,
                    )
            for event in () if begun else self._beginnings(kind):
                yield event
            for row, finish in enumerate(self.finishes):
                if finish is None:  # no new token was requested
                    yield self._event(
                        kind, row, {"delta": {}} if self.is_chat else {"text": ""}, FINISH[None]
                    )
        except Exception as error:  # the client gets it, and the server continues
            yield f"data: {response_to_error(error, field).body.decode()}\n\n"
            return
        if with_usage:
            yield self._as_event({"object": kind, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    def _beginnings(self, kind: str) -> Iterator[str]:
        for row, echo in enumerate(self.texts):
            if self.is_chat:
                yield self._event(kind, row, {"delta": {"role": "assistant", "content": ""}}, None)
            elif echo:
                num_echoed = (
                    sum(score.is_prompt for score in self.scores[row]) if self.scores else 0
                )
                yield self._event(kind, row, {"text": echo}, None, self._logprobs(row, num_echoed))

    def _logprobs(self, row: int, count: int | None = None) -> dict | None:
        """Return the log-probabilities of a text's next tokens (default: all that are left).

        None where the request wants none.
        """
        if self.scores is None:
            return None
        scores = self.scores[row][:count]
        del self.scores[row][: len(scores)]
        if self.is_chat:
            return as_chat_logprobs(scores)
        first = self.offsets[row]
        self.offsets[row] += sum(len(score.text) for score in scores)
        return as_text_logprobs(scores, first)

    def _event(
        self, kind: str, row: int, content: dict, finish: str | None, logprobs: dict | None = None
    ) -> str:
        choice = {"index": row, **content, "finish_reason": finish}
        if logprobs is not None or not self.is_chat:
            choice["logprobs"] = logprobs
        return self._as_event({"object": kind, "choices": [choice]})

    def _as_event(self, fields: dict) -> str:
        # in ASCII: many line readers end lines at U+2028 and U+0085 too
        return f"data: {json.dumps({**self.common_fields, **fields})}\n\n"
