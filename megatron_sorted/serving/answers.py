"""Answers in OpenAI's form: whole ones, streams, errors."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator

from fastapi.responses import JSONResponse

from megatron_sorted.decoding.text_generator import StreamedText
from megatron_sorted.errors import MemoryExhaustedError, SortedError
from megatron_sorted.serving.token_logprobs import TokenScore, as_chat_logprobs, as_text_logprobs

FINISH = {"eos": "stop", "stop": "stop", "length": "length", None: "length"}
"""Why a text is over, in OpenAI's words; one of no new tokens has reached its length."""
RETRY_SECONDS = 5


class RefusedError(SortedError):
    """A request that cannot be answered, with the field that is to blame and the status of the answer."""

    def __init__(self, message: str, field: str | None = None, status: int = 400):
        super().__init__(message)
        self.field, self.status = field, status


class BusyError(SortedError):
    """The server takes no more requests for now, or none at all since it is about to end; later another try may go well."""

    def __init__(self, message: str, retry_seconds: int = RETRY_SECONDS):
        super().__init__(message)
        self.retry_seconds = retry_seconds


class AsciiResponse(JSONResponse):
    """JSON in ASCII, which any text can be written in, halves of UTF-16 pairs too."""

    def render(self, content: object) -> bytes:
        """Return the body."""
        return json.dumps(content).encode("ascii")


def refuse(
    message: str, field: str | None = None, status: int = 400, retry_seconds: int = RETRY_SECONDS
) -> JSONResponse:
    """Return an error as OpenAI writes it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"retry-after": str(retry_seconds)} if status == 503 else None
    return AsciiResponse(
        {"error": {"message": message, "type": kind, "param": field, "code": None}}, status, headers
    )


def failed(error: Exception, field: str | None) -> JSONResponse:
    """Return what a client is told of a request that cannot be answered, or of a text that failed."""
    if isinstance(error, RefusedError):
        return refuse(str(error), error.field, error.status)
    if isinstance(error, BusyError):
        return refuse(str(error), None, 503, error.retry_seconds)
    if isinstance(error, MemoryExhaustedError):
        return refuse(str(error), None, 503)
    if isinstance(error, SortedError):
        return refuse(str(error), field)
    return refuse(
        f"the server failed ({type(error).__name__}); it goes on with other requests.", None, 500
    )


class CompletionResponse:
    """An answer as OpenAI writes it.

    Args:
        prefix: Of the answer's id.
        kind: "text_completion" or "chat.completion".
        model: Its name.
        echoes: What stands before the text of each prompt.
    """

    def __init__(self, prefix: str, kind: str, model: str, echoes: list[str]):
        self.kind, self.echoes, self.is_chat = kind, echoes, kind == "chat.completion"
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.scores: list[list[TokenScore]] | None = None

    def begin(self, n: int, prompt_tokens: int) -> None:
        """Record how many texts come."""
        self.texts = [echo for echo in self.echoes for _ in range(n)]
        self.finishes: list[str | None] = [None] * len(self.texts)
        self.offsets = [0] * len(self.texts)
        self.prompt_tokens, self.tokens = prompt_tokens, 0

    def take(self, piece: StreamedText) -> str:
        """Return the new text, after recording it; what an assistant says begins without the space before its first word."""
        text = piece.text if self.texts[piece.row] or not self.is_chat else piece.text.lstrip(" ")
        self.texts[piece.row] += text
        self.finishes[piece.row] = piece.finish
        self.tokens += len(piece.added.tokens)
        return text

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
        }

    def whole(self) -> dict:
        """Return the answer."""
        choices = []
        for index, (text, finish) in enumerate(zip(self.texts, self.finishes, strict=True)):
            said = (
                {"message": {"role": "assistant", "content": text}}
                if self.is_chat
                else {"text": text}
            )
            choices.append(
                {
                    "index": index,
                    **said,
                    "logprobs": self._logprobs(index),
                    "finish_reason": FINISH[finish],
                }
            )
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    async def stream(
        self, pieces: AsyncIterator[StreamedText | list], field: str, with_usage: bool
    ) -> AsyncIterator[str]:
        """Yield server-sent events; ``with_usage`` one of the tokens, without choices, before the last."""
        kind = "chat.completion.chunk" if self.is_chat else self.kind
        # with scores, which are there only when the texts are over, those of what stands before them come first
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
                text = self.take(piece)
                if text or piece.finish or self.scores:
                    said = (
                        {"delta": {"content": text} if text else {}}
                        if self.is_chat
                        else {"text": text}
                    )
                    logprobs = self._logprobs(piece.row, len(piece.added.tokens))
                    yield self._event(
                        kind,
                        piece.row,
                        said,
                        FINISH[piece.finish] if piece.finish else None,
                        logprobs,
                    )
            for event in () if begun else self._beginnings(kind):
                yield event
            for row, finish in enumerate(self.finishes):
                if finish is None:  # no new token was asked for
                    yield self._event(
                        kind, row, {"delta": {}} if self.is_chat else {"text": ""}, FINISH[None]
                    )
        except Exception as error:
            yield f"data: {failed(error, field).body.decode()}\n\n"
            return
        if with_usage:
            yield f"data: {json.dumps({**self.head, 'object': kind, 'choices': [], 'usage': self.usage()})}\n\n"
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
        """Return the log-probabilities of the next tokens of a text, of all that are left by default; None where none were asked for."""
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
        self, kind: str, row: int, said: dict, finish: str | None, logprobs: dict | None = None
    ) -> str:
        choice = {"index": row, **said, "finish_reason": finish}
        if logprobs is not None or not self.is_chat:
            choice["logprobs"] = logprobs
        # in ASCII: many readers of lines end them at U+2028 and U+0085 too
        return f"data: {json.dumps({**self.head, 'object': kind, 'choices': [choice]})}\n\n"
