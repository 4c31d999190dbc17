"""Responses with texts in OpenAI's format: complete ones and streams."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator

from megatron_sorted.decoding.text_generator import StreamedText
from megatron_sorted.serving.answers import response_to_error
from megatron_sorted.serving.requests import StreamOptions
from megatron_sorted.serving.token_logprobs import TokenScore, as_chat_logprobs, as_text_logprobs
from megatron_sorted.serving.usage import Usage

FINISH = {"eos": "stop", "stop": "stop", "length": "length", None: "length"}
"""Our reason for a text's end -> OpenAI's; a text of no new tokens has reached its length."""


class CompletionResponse:
    """A response in OpenAI's format, built from the outputs of a job.

    Args:
        kind: "text_completion" or "chat.completion".
        model: Name of the model.
        echoes: The text to put before the completion of each prompt.
    """

    def __init__(self, kind: str, model: str, echoes: list[str]):
        self.kind, self.echoes, self.is_chat = kind, echoes, kind == "chat.completion"
        self.common_fields = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.scores: list[list[TokenScore]] | None = None

    def begin(self, n: int, usage: Usage) -> None:
        """Prepare for ``n`` texts of each prompt, whose tokens are counted in ``usage``."""
        self.usage = usage
        self.texts = [echo for echo in self.echoes for _ in range(n)]
        self.finishes: list[str | None] = [None] * len(self.texts)
        self.offsets = [0] * len(self.texts)

    def add(self, piece: StreamedText) -> list[tuple[str, int]]:
        """Record new tokens and return their texts, each with its exit.

        A chat message begins without a space.
        """
        parts = []
        for text, depth in piece.parts:
            new = text if self.texts[piece.row] or not self.is_chat else text.lstrip(" ")
            self.texts[piece.row] += new
            parts.append((new, depth))
        self.finishes[piece.row] = piece.finish
        return parts

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
            "usage": self.usage.fields(),
        }

    async def stream(
        self, pieces: AsyncIterator[StreamedText | list], field: str, options: StreamOptions
    ) -> AsyncIterator[str]:
        """Yield server-sent events; where ``options`` say so the last but one holds the usage."""
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
                parts = self.add(piece)
                text = "".join(part for part, _ in parts)
                shown = {"parts": parts} if parts and options.include_depths else {}
                if text or piece.finish or self.scores or shown:
                    content = (
                        {"delta": {"content": text} if text else {}}
                        if self.is_chat
                        else {"text": text}
                    )
                    logprobs = self._logprobs(piece.row, len(piece.added.tokens))
                    yield self._event(
                        kind,
                        piece.row,
                        content | shown,
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
        if options.include_usage:
            yield self._as_event({"object": kind, "choices": [], "usage": self.usage.fields()})
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
