"""OpenAI's completions and chat endpoints over a worker, for existing clients."""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from megatron_sorted.decoding.strategies import SamplingParameters, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.texts import check_prompts
from megatron_sorted.errors import DataError, SortedError
from megatron_sorted.serving.answers import (
    AsciiResponse,
    CompletionResponse,
    RefusedError,
    error_response,
    response_to_error,
)
from megatron_sorted.serving.body import MAX_PROMPTS, max_body_bytes, parse_body, read_body
from megatron_sorted.serving.connections import cancel_on_disconnect, outputs_of
from megatron_sorted.serving.job import Job, check_scoring
from megatron_sorted.serving.requests import (
    ChatRequest,
    CompletionRequest,
    Kind,
    excerpt,
    read_prompts,
    read_request,
    read_stop_sequences,
)
from megatron_sorted.serving.token_logprobs import Scoring
from megatron_sorted.serving.turns import read_messages
from megatron_sorted.serving.worker import GenerationWorker

DEFAULT_TOKENS = 256
DEFAULT_SAMPLING = SamplingParameters(temperature=1.0)
PROBED_CHARACTERS = 8
"""Characters per token of the context; of a longer text the beginning is encoded first.

That mostly shows, at a bounded cost, that the text is too long.
"""
MANY_CHARACTERS = 20_000
"""The length from which texts are encoded in a thread, while others are served."""
MAX_TURNS, CHARACTERS_PER_TURN = 4096, 100
"""The most turns of a conversation; about what a chat template writes around a turn."""


def make_app(
    worker: GenerationWorker,
    name: str,
    strategy_of: Callable[[str | None], Strategy | None],
    defaults: SamplingParameters = DEFAULT_SAMPLING,
) -> FastAPI:
    """Build the application.

    Args:
        worker: The owner of the model.
        name: The model's name for clients.
        strategy_of: Maps a request's strategy to an object: None to the server's own; returns None
            where the worker is to choose.
        defaults: The sampling parameters for what a request does not set.
    """
    app = FastAPI(
        title="megatron_sorted",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        default_response_class=AsciiResponse,
    )
    generator = worker.generator
    network = generator.network
    max_bytes, most_tokens = max_body_bytes(network), network.max_positions
    encoding = asyncio.Lock()

    @app.exception_handler(SortedError)
    async def refused(_: Request, error: SortedError) -> Response:
        return response_to_error(error, None)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        return error_response(
            f"{request.method} {request.url.path[:200]}: {error.detail}.", None, error.status_code
        )

    @app.exception_handler(ClientDisconnect)
    async def disconnected(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # the framework wants one, though no client receives it

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

    @app.get("/v1/models/{requested:path}")
    async def one_model(requested: str) -> dict:
        check_name(requested)
        return model

    @app.get("/v1/adaptation")
    async def adaptation():
        if worker.adaptation is None:
            return error_response(
                "adaptation: this server does not choose strategies. Start it with --adapt.",
                None,
                404,
            )
        names = [strategy.name for strategy in worker.adaptation.strategies]
        return {
            "object": "adaptation",
            "strategies": names,
            "ways": names,  # the key of 0.6.0, for its clients
            "tasks": worker.adaptation.learned,
        }

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await requested_of(CompletionRequest, request)
        prompts = read_prompts(body.prompt, MAX_PROMPTS, most_tokens, network.vocab_size)
        ids = await encoded(
            sum(len(prompt) for prompt in prompts if isinstance(prompt, str)),
            lambda: [
                tokens_of(prompt, "prompt", generator.encode) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ],
        )
        echoes = [
            (prompt if isinstance(prompt, str) else generator.tokenizer.decode(prompt))
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
        messages = read_messages(body.messages, min(most_tokens, MAX_TURNS))
        contents = "\n".join(message["content"] for message in messages)

        def encode(text: str) -> list[int]:
            # the check of a long text encodes its beginning alone, without the template
            return generator.encode_chat(messages) if text is contents else generator.encode(text)

        ids = await encoded(
            len(contents) + CHARACTERS_PER_TURN * len(messages),
            lambda: [tokens_of(contents, "messages", encode)],
        )
        return await answer(
            body,
            request,
            ids,
            CompletionResponse("chatcmpl", "chat.completion", name, [""]),
            "messages",
        )

    async def requested_of(kind: type[Kind], request: Request) -> Kind:
        """Return a request's checked body."""
        values = parse_body(
            await read_body(request, max_bytes), request.headers.get("content-type", "")
        )
        body = read_request(kind, values)
        if body.model is not None:
            check_name(body.model)
        return body

    def check_name(requested: str) -> None:
        if requested != name:
            raise RefusedError(
                f"model: {excerpt(requested)} is not served here, only {name!r}.", "model", 404
            )

    async def encoded(num_characters: int, work: Callable[[], list[list[int]]]) -> list[list[int]]:
        """Return the tokens of prompts; long ones are encoded in a thread, one at a time."""
        if num_characters < MANY_CHARACTERS:
            return work()
        async with encoding:
            return await asyncio.to_thread(work)

    def tokens_of(text: str, field: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Return the tokens of a text; refuse a far too long one after encoding its beginning."""
        most_characters = PROBED_CHARACTERS * (most_tokens + 1)
        try:
            if (
                len(text) > most_characters
                and (count := len(encode(text[:most_characters]))) > most_tokens + 1
            ):
                raise RefusedError(
                    f"{field}: {len(text)} characters, of which the first {most_characters} alone "
                    f"are {count} tokens, are more than the model's context of {most_tokens} "
                    "tokens. Shorten it.",
                    field,
                )
            ids = encode(text)
        except DataError as error:
            raise RefusedError(str(error), field) from error
        if len(ids) > most_tokens:
            raise RefusedError(
                f"{field}: {len(ids)} tokens are more than the model's context of {most_tokens}. "
                "Shorten it.",
                field,
            )
        return ids

    def job_of(body: Any, ids: list[list[int]], field: str) -> Job:
        """Build the job of a request whose prompts are encoded."""
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
            body.sampling(defaults, seed),
            min(DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens, room),
            read_stop_sequences(body.stop),
            body.task,
            None if num_top is None else Scoring(num_top, getattr(body, "echo", False)),
        )

    async def answer(
        body: Any, request: Request, ids: list[list[int]], response: CompletionResponse, field: str
    ) -> Response:
        job = job_of(body, ids, field)
        outputs = outputs_of(job)
        worker.submit(job)
        response.begin(body.n, sum(map(len, ids)))
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(
                response.stream(outputs, field, with_usage), media_type="text/event-stream"
            )
        watch = asyncio.create_task(cancel_on_disconnect(request, job))
        try:
            async for output in outputs:
                if isinstance(output, list):
                    response.scores = output
                else:
                    response.add(output)
        except Exception as error:  # the client gets it, and the server continues
            return response_to_error(error, field)
        finally:
            watch.cancel()
        return AsciiResponse(response.complete())

    return app


def served_name(generator: TextGenerator, given: str | None) -> str:
    """Return the model's name for clients: the given one, else the name of its directory."""
    return (
        given
        or str(getattr(generator.network.model.config, "_name_or_path", "") or "model")
        .rstrip("/")
        .rsplit("/", 1)[-1]
    )
