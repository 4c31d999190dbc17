"""Answers in OpenAI's form: whole ones, streams, errors."""

import json
import time
import uuid
from collections.abc import AsyncIterator

from fastapi.responses import JSONResponse

from megatron_sorted.decoding.writer import Piece
from megatron_sorted.errors import MemoryExhaustedError, SortedError

FINISH = {"eos": "stop", "stop": "stop", "length": "length", None: None}


def refuse(message: str, field: str | None = None, status: int = 400) -> JSONResponse:
    """Returns an error as OpenAI writes it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": field, "code": None}}, status)


def failed(error: Exception, field: str) -> JSONResponse:
    """Returns what a client is told of a job that failed."""
    if isinstance(error, MemoryExhaustedError):
        return refuse(str(error), None, 503)
    if isinstance(error, SortedError):
        return refuse(str(error), field)
    return refuse(f"the server failed ({type(error).__name__}); it goes on with other requests.", None, 500)


class Answer:
    """An answer as OpenAI writes it.

    Args:
        prefix: Of the answer's id.
        kind: "text_completion" or "chat.completion".
        model: Its name.
        echoes: What stands before the text of each prompt.
    """

    def __init__(self, prefix: str, kind: str, model: str, echoes: list[str]):
        self.kind, self.echoes = kind, echoes
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def begin(self, n: int, prompt_tokens: int) -> None:
        """Takes note of how many texts come."""
        self.texts = [echo for echo in self.echoes for _ in range(n)]
        self.finishes: list[str | None] = [None] * len(self.texts)
        self.prompt_tokens, self.tokens = prompt_tokens, 0

    def take(self, piece: Piece) -> str:
        """Returns the new text, after taking note of it; what an assistant says begins without the space before its first word."""
        text = piece.text if self.texts[piece.row] or self.kind != "chat.completion" else piece.text.lstrip(" ")
        self.texts[piece.row] += text
        self.finishes[piece.row] = piece.finish
        self.tokens += len(piece.added.tokens)
        return text

    def usage(self) -> dict[str, int]:
        """Returns the tokens."""
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": self.prompt_tokens + self.tokens}

    def whole(self) -> dict:
        """Returns the answer."""
        choices = []
        for index, (text, finish) in enumerate(zip(self.texts, self.finishes, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self.kind == "chat.completion" else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": FINISH[finish]})
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    async def stream(self, pieces: AsyncIterator[Piece], field: str, with_usage: bool) -> AsyncIterator[str]:
        """Yields server-sent events; ``with_usage`` one of the tokens, without choices, before the last."""
        is_chat = self.kind == "chat.completion"
        kind = "chat.completion.chunk" if is_chat else self.kind
        for row, echo in enumerate(self.texts):
            if is_chat:
                yield self._event(kind, row, {"delta": {"role": "assistant", "content": ""}}, None)
            elif echo:
                yield self._event(kind, row, {"text": echo}, None)
        try:
            async for piece in pieces:
                text = self.take(piece)
                if text or piece.finish:
                    said = {"delta": {"content": text} if text else {}} if is_chat else {"text": text}
                    yield self._event(kind, piece.row, said, FINISH[piece.finish])
        except Exception as error:
            yield f"data: {failed(error, field).body.decode()}\n\n"
            return
        if with_usage:
            yield f"data: {json.dumps({**self.head, 'object': kind, 'choices': [], 'usage': self.usage()})}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, kind: str, row: int, said: dict, finish: str | None) -> str:
        choice = {"index": row, **said, "finish_reason": finish} | ({} if "delta" in said else {"logprobs": None})
        # in ASCII: many readers of lines end them at U+2028 and U+0085 too
        return f"data: {json.dumps({**self.head, 'object': kind, 'choices': [choice]})}\n\n"
