"""OpenAI's completions and chat endpoints over a worker, for clients that exist."""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from megatron_sorted.decoding.generate import check_prompts
from megatron_sorted.decoding.strategies import SamplingParameters, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.errors import DataError, SortedError
from megatron_sorted.serving.answers import (
    AsciiResponse,
    CompletionResponse,
    RefusedError,
    failed,
    refuse,
)
from megatron_sorted.serving.body import MOST_PROMPTS, most_body_bytes, parse_body, read_body
from megatron_sorted.serving.connections import pieces_of, until_gone
from megatron_sorted.serving.requests import (
    ChatRequest,
    CompletionRequest,
    Kind,
    read_prompts,
    read_request,
    read_stops,
    shown,
)
from megatron_sorted.serving.turns import read_messages
from megatron_sorted.serving.worker import GenerationWorker, Job, Scoring, check_scoring

DEFAULT_TOKENS = 256
USUAL = SamplingParameters(temperature=1.0)
PROBED_CHARACTERS = 8
"""A token: of a text longer than as many a token as the context has, so much is encoded first, which mostly shows that it is too long."""
MANY_LETTERS = 20_000
"""From so many on texts are encoded in a thread, while others are served."""
MOST_TURNS, LETTERS_OF_A_TURN = 4096, 100
"""Of a conversation; what a chat template writes around a turn, about."""


def make_app(
    worker: GenerationWorker,
    name: str,
    strategy_of: Callable[[str | None], Strategy | None],
    usual: SamplingParameters = USUAL,
) -> FastAPI:
    """Return the application.

    Args:
        worker: Owns the model.
        name: Of the model, as clients call it.
        strategy_of: The way for what a request asks, the server's own for None; None where the worker is to choose.
        usual: How tokens are chosen where a request does not say.
    """
    app = FastAPI(
        title="megatron_sorted",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        default_response_class=AsciiResponse,
    )
    writer = worker.writer
    network = writer.network
    most_bytes, most_tokens = most_body_bytes(network), network.max_positions
    encoding = asyncio.Lock()

    @app.exception_handler(SortedError)
    async def refused(_: Request, error: SortedError) -> Response:
        return failed(error, None)

    @app.exception_handler(HTTPException)
    async def unheard(request: Request, error: HTTPException) -> Response:
        return refuse(
            f"{request.method} {request.url.path[:200]}: {error.detail}.", None, error.status_code
        )

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody gets it

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    model = {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "megatron_sorted",
        "exits": list(network.depths),
    }

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict:
        check_name(asked)
        return model

    @app.get("/v1/adaptation")
    async def adaptation():
        if worker.adaptation is None:
            return refuse(
                "adaptation: this server chooses no ways by itself. Start it with --adapt.",
                None,
                404,
            )
        names = [strategy.name for strategy in worker.adaptation.strategies]
        return {
            "object": "adaptation",
            "strategies": names,
            "ways": names,
            "tasks": worker.adaptation.learned,
        }

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await requested_of(CompletionRequest, request)
        prompts = read_prompts(body.prompt, MOST_PROMPTS, most_tokens, network.vocab_size)
        ids = await encoded(
            sum(len(prompt) for prompt in prompts if isinstance(prompt, str)),
            lambda: [
                tokens_of(prompt, "prompt", writer.encode) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ],
        )
        echoes = [
            (prompt if isinstance(prompt, str) else writer.tokenizer.decode(prompt))
            if body.echo
            else ""
            for prompt in prompts
        ]
        return await answer(
            body,
            request,
            ids,
            CompletionResponse("cmpl", "text_completion", name, echoes),
            "prompt",
        )

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await requested_of(ChatRequest, request)
        messages = read_messages(body.messages, min(most_tokens, MOST_TURNS))
        said = "\n".join(message["content"] for message in messages)
        ids = await encoded(
            len(said) + LETTERS_OF_A_TURN * len(messages),
            lambda: [
                tokens_of(
                    said,
                    "messages",
                    lambda text: (
                        writer.encode_chat(messages) if text is said else writer.encode(text)
                    ),
                )
            ],
        )
        return await answer(
            body,
            request,
            ids,
            CompletionResponse("chatcmpl", "chat.completion", name, [""]),
            "messages",
        )

    async def requested_of(kind: type[Kind], request: Request) -> Kind:
        """Return what a request asks."""
        values = parse_body(
            await read_body(request, most_bytes), request.headers.get("content-type", "")
        )
        body = read_request(kind, values)
        if body.model is not None:
            check_name(body.model)
        return body

    def check_name(asked: str) -> None:
        if asked != name:
            raise RefusedError(
                f"model: {shown(asked)} is not served here, only {name!r}.", "model", 404
            )

    async def encoded(num_letters: int, work: Callable[[], list[list[int]]]) -> list[list[int]]:
        """Return the tokens of prompts; many letters take a while, in which others are served."""
        if num_letters < MANY_LETTERS:
            return work()
        async with encoding:
            return await asyncio.to_thread(work)

    def tokens_of(text: str, field: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Return the tokens of a text that may fit; of one that is much too long only the beginning is encoded."""
        most_letters = PROBED_CHARACTERS * (most_tokens + 1)
        try:
            if (
                len(text) > most_letters
                and (count := len(encode(text[:most_letters]))) > most_tokens + 1
            ):
                raise RefusedError(
                    f"{field}: {len(text)} characters, of which the first {most_letters} alone are {count} tokens, are more "
                    f"than the model's context of {most_tokens} tokens. Shorten it.",
                    field,
                )
            ids = encode(text)
        except DataError as error:
            raise RefusedError(str(error), field) from error
        if len(ids) > most_tokens:
            raise RefusedError(
                f"{field}: {len(ids)} tokens are more than the model's context of {most_tokens}. Shorten it.",
                field,
            )
        return ids

    def job_of(body: Any, ids: list[list[int]], field: str) -> Job:
        """Return the job of a request whose prompts are encoded."""
        longest = max(map(len, ids))
        room = most_tokens - longest
        if room < 1 and body.max_tokens != 0:
            raise RefusedError(
                f"{field}: {longest} tokens fill the model's context of {most_tokens}. Shorten it.",
                field,
            )
        check_prompts(ids, network, 0)
        seed = body.seed if body.seed is not None else uuid.uuid4().int % (1 << 31)
        num_top = body.num_top_logprobs
        try:
            strategy = strategy_of(body.strategy)
            if num_top is not None:
                check_scoring(strategy)
        except SortedError as error:
            raise RefusedError(str(error), "strategy") from error
        return Job(
            [prompt for prompt in ids for _ in range(body.n)],
            strategy,
            body.sampling(usual, seed),
            min(DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens, room),
            read_stops(body.stop),
            body.task,
            None if num_top is None else Scoring(num_top, getattr(body, "echo", False)),
        )

    async def answer(
        body: Any, request: Request, ids: list[list[int]], form: CompletionResponse, field: str
    ) -> Response:
        job = job_of(body, ids, field)
        pieces = pieces_of(job)
        worker.submit(job)
        form.begin(body.n, sum(map(len, ids)))
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(
                form.stream(pieces, field, with_usage), media_type="text/event-stream"
            )
        watch = asyncio.create_task(until_gone(request, job))
        try:
            async for piece in pieces:
                if isinstance(piece, list):
                    form.scores = piece
                else:
                    form.take(piece)
        except Exception as error:
            return failed(error, field)
        finally:
            watch.cancel()
        return AsciiResponse(form.whole())

    return app


def served_name(writer: TextGenerator, given: str | None) -> str:
    """Return what clients call the model: as given, else the name of its directory."""
    return (
        given
        or str(getattr(writer.network.model.config, "_name_or_path", "") or "model")
        .rstrip("/")
        .rsplit("/", 1)[-1]
    )
