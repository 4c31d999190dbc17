"""OpenAI's completions and chat endpoints over a worker, for clients that exist."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from megatron_sorted.decoding.sampling import Sampling
from megatron_sorted.decoding.ways import Way
from megatron_sorted.decoding.writer import Piece, Writer
from megatron_sorted.errors import MemoryExhaustedError, SortedError

from .requests import ChatRequest, CompletionRequest, Message
from .worker import BusyError, Job, Worker

FINISH = {"eos": "stop", "stop": "stop", "length": "length", None: None}
DEFAULT_TOKENS = 256
END = object()


def refuse(message: str, field: str | None = None, status: int = 400) -> JSONResponse:
    """Returns an error as OpenAI writes it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": field, "code": None}}, status)


def field_of(place: Sequence[str | int]) -> str | None:
    """Returns the field in an error's ``loc`` of pydantic, such as messages.0.content; None for the whole body.

    What pydantic adds to it, the kind it tried where a field takes several, is nothing that a client wrote.
    """
    names = [part for part in place if part != "body"]
    return ".".join(str(part) for part in [*names[:1], *(p for p in names[1:] if isinstance(p, int) or p in Message.model_fields)]) or None


def make_app(worker: Worker, name: str, way_of: Callable[[str | None], Way | None]) -> FastAPI:
    """Returns the application; when it ends, the worker does.

    Args:
        worker: Owns the model.
        name: Of the model, as clients call it.
        way_of: The way for what a request asks, the server's own for None; None where the worker is to choose.
    """
    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(title="megatron_sorted", docs_url=None, redoc_url=None, lifespan=life)
    writer = worker.writer

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = field_of(first["loc"])
        return refuse(f"{place or 'body'}: {first['msg']}.", place)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "megatron_sorted",
                                            "exits": list(writer.network.depths)}]}

    @app.get("/v1/adaptation")
    async def adaptation():
        if worker.adaptation is None:
            return refuse("adaptation: this server chooses no ways by itself. Start it with --adapt.", None, 404)
        return {"object": "adaptation", "ways": [way.name for way in worker.adaptation.ways], "tasks": worker.adaptation.learned}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        if body.model not in (None, name):
            return refuse(f"model: {body.model!r} is not served here, only {name!r}.", "model", 404)
        asked = body.prompt
        texts = [asked] if isinstance(asked, str) else asked if isinstance(asked[0], str) else None
        try:
            ids = [writer.encode(text) for text in texts] if texts is not None else [asked]
        except SortedError as error:
            return refuse(str(error), "prompt")
        echoes = [text if body.echo else "" for text in texts or [""]]
        return await answer(body, request, ids, Format("cmpl", "text_completion", name, echoes))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        if body.model not in (None, name):
            return refuse(f"model: {body.model!r} is not served here, only {name!r}.", "model", 404)
        try:
            ids = [writer.encode_chat([message.model_dump() for message in body.messages])]
        except SortedError as error:
            return refuse(str(error), "messages")
        return await answer(body, request, ids, Format("chatcmpl", "chat.completion", name, [""]))

    async def answer(body, request: Request, ids: list[list[int]], form: "Format"):
        prompts = [prompt for prompt in ids for _ in range(body.n)]
        room = writer.network.max_positions - max(map(len, prompts))
        field = "prompt" if isinstance(body, CompletionRequest) else "messages"
        if room < 1:
            return refuse(f"{field}: {max(map(len, prompts))} tokens fill the model's context of {writer.network.max_positions}.", field)
        seed = body.seed if body.seed is not None else uuid.uuid4().int % (1 << 31)
        try:
            sampling = Sampling(body.temperature, body.top_k, body.top_p, body.repetition_penalty, seed)
            most = min(body.max_tokens or DEFAULT_TOKENS, room)
            job = worker.submit(Job(prompts, way_of(body.way), sampling, most, body.stops, body.task))
        except BusyError as error:
            return refuse(str(error), None, 503)
        except SortedError as error:
            return refuse(str(error), "way")
        form.begin(body.n, sum(map(len, ids)))
        pieces = in_background(job)
        if body.stream:
            return StreamingResponse(form.stream(pieces, request, job), media_type="text/event-stream")
        try:
            async for piece in pieces:
                form.take(piece)
                if await request.is_disconnected():
                    job.gone.set()
        except Exception as error:
            return failed(error, field)
        return JSONResponse(form.whole())

    return app


def failed(error: Exception, field: str) -> JSONResponse:
    """Returns what a client is told of a job that failed."""
    if isinstance(error, MemoryExhaustedError):
        return refuse(str(error), None, 503)
    if isinstance(error, SortedError):
        return refuse(str(error), field)
    return refuse(f"the server failed ({type(error).__name__}); it goes on with other requests.", None, 500)


async def in_background(job: Job) -> AsyncIterator[Piece]:
    """Yields a job's pieces without holding up the event loop; nobody listening any more ends the job."""
    results = job.results()
    try:
        while (piece := await asyncio.to_thread(next, results, END)) is not END:
            yield piece
    finally:
        job.gone.set()


class Format:
    """Answers as OpenAI writes them.

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

    def take(self, piece: Piece) -> None:
        """Takes note of a piece."""
        self.texts[piece.row] += piece.text
        self.finishes[piece.row] = piece.finish
        self.tokens += len(piece.added.tokens)

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

    async def stream(self, pieces: AsyncIterator[Piece], request: Request, job: Job) -> AsyncIterator[str]:
        """Yields server-sent events."""
        is_chat = self.kind == "chat.completion"
        kind = "chat.completion.chunk" if is_chat else self.kind
        for row, echo in enumerate(self.texts):
            if is_chat:
                yield self._event(kind, row, {"delta": {"role": "assistant", "content": ""}}, None)
            elif echo:
                yield self._event(kind, row, {"text": echo}, None)
        try:
            async for piece in pieces:
                self.take(piece)
                if piece.text or piece.finish:
                    said = {"delta": {"content": piece.text} if piece.text else {}} if is_chat else {"text": piece.text}
                    yield self._event(kind, piece.row, said, FINISH[piece.finish])
        except Exception as error:
            yield f"data: {failed(error, 'prompt').body.decode()}\n\n"
            return
        finally:
            job.gone.set()
        yield f"data: {json.dumps({**self.head, 'object': kind, 'choices': [], 'usage': self.usage()})}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, kind: str, row: int, said: dict, finish: str | None) -> str:
        choice = {"index": row, **said, "finish_reason": finish} | ({} if "delta" in said else {"logprobs": None})
        return f"data: {json.dumps({**self.head, 'object': kind, 'choices': [choice]}, ensure_ascii=False)}\n\n"


def served_name(writer: Writer, given: str | None) -> str:
    """Returns what clients call the model: as given, else the name of its directory."""
    return given or str(getattr(writer.network.model.config, "_name_or_path", "") or "model").rstrip("/").rsplit("/", 1)[-1]
