"""OpenAI's completions and chat endpoints over a worker, for clients that exist."""

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from megatron_sorted.decoding.generate import check_prompts
from megatron_sorted.decoding.sampling import Sampling
from megatron_sorted.decoding.ways import Way
from megatron_sorted.decoding.writer import Writer
from megatron_sorted.errors import SortedError

from .answers import Answer, failed, refuse
from .connections import BoundedBody, pieces_of, until_gone
from .requests import ChatRequest, CompletionRequest, Turn
from .worker import BusyError, Job, Worker

DEFAULT_TOKENS = 256
USUAL = Sampling(temperature=1.0)


def field_of(place: Sequence[str | int]) -> str | None:
    """Returns the field in an error's ``loc`` of pydantic, such as messages.0.content; None for the whole body.

    What pydantic adds to it, the kind it tried where a field takes several, is nothing that a client wrote.
    """
    names = [part for part in place if part != "body"]
    return ".".join(str(part) for part in [*names[:1], *(p for p in names[1:] if isinstance(p, int) or p in Turn.model_fields)]) or None


def make_app(worker: Worker, name: str, way_of: Callable[[str | None], Way | None], usual: Sampling = USUAL) -> FastAPI:
    """Returns the application; when it ends, the worker does.

    Args:
        worker: Owns the model.
        name: Of the model, as clients call it.
        way_of: The way for what a request asks, the server's own for None; None where the worker is to choose.
        usual: How tokens are chosen where a request does not say.
    """
    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(title="megatron_sorted", docs_url=None, redoc_url=None, lifespan=life)
    writer = worker.writer

    app.add_middleware(BoundedBody)
    encoding = asyncio.Lock()

    async def encoded(work: Callable[[], list[list[int]]]) -> list[list[int]]:
        """Returns prompts that can be gone on with; long ones take a while, in which the others are served."""
        async with encoding:
            ids = await asyncio.to_thread(work)
        check_prompts(ids, writer.network, 0)
        return ids

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = field_of(first["loc"])
        return refuse(f"{place or 'body'}: {first['msg'].removeprefix('Value error, ')}.", place)

    @app.exception_handler(HTTPException)
    async def unheard(request: Request, error: HTTPException) -> JSONResponse:
        return refuse(f"{request.method} {request.url.path}: {error.detail}.", None, error.status_code)

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
            ids = await encoded(lambda: [asked] if texts is None else [writer.encode(text) for text in texts])
        except SortedError as error:
            return refuse(str(error), "prompt")
        echoes = [text if body.echo else "" for text in texts or [writer.tokenizer.decode(asked)]]
        return await answer(body, request, ids, Answer("cmpl", "text_completion", name, echoes))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        if body.model not in (None, name):
            return refuse(f"model: {body.model!r} is not served here, only {name!r}.", "model", 404)
        try:
            ids = await encoded(lambda: [writer.encode_chat([message.model_dump() for message in body.messages])])
        except SortedError as error:
            return refuse(str(error), "messages")
        return await answer(body, request, ids, Answer("chatcmpl", "chat.completion", name, [""]))

    async def answer(body, request: Request, ids: list[list[int]], form: Answer):
        prompts = [prompt for prompt in ids for _ in range(body.n)]
        room = writer.network.max_positions - max(map(len, prompts))
        field = "prompt" if isinstance(body, CompletionRequest) else "messages"
        if room < 1:
            return refuse(f"{field}: {max(map(len, prompts))} tokens fill the model's context of {writer.network.max_positions}.", field)
        seed = body.seed if body.seed is not None else uuid.uuid4().int % (1 << 31)
        try:
            asked = {name: getattr(body, name) for name in body.model_fields_set & {"temperature", "top_k", "top_p", "repetition_penalty"}}
            sampling = dataclasses.replace(usual, **asked, seed=seed)
            most = min(body.max_tokens or DEFAULT_TOKENS, room)
            job = Job(prompts, way_of(body.way), sampling, most, body.stops, body.task)
            pieces = pieces_of(job)
            worker.submit(job)
        except BusyError as error:
            return refuse(str(error), None, 503)
        except SortedError as error:
            return refuse(str(error), "way")
        form.begin(body.n, sum(map(len, ids)))
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(form.stream(pieces, field, with_usage), media_type="text/event-stream")
        watch = asyncio.create_task(until_gone(request, job))
        try:
            async for piece in pieces:
                form.take(piece)
        except Exception as error:
            return failed(error, field)
        finally:
            watch.cancel()
        return JSONResponse(form.whole())

    return app


def served_name(writer: Writer, given: str | None) -> str:
    """Returns what clients call the model: as given, else the name of its directory."""
    return given or str(getattr(writer.network.model.config, "_name_or_path", "") or "model").rstrip("/").rsplit("/", 1)[-1]
